"""The vocabulary of the world. All of it is invented here; nothing is taken from AppWorld's data.

Where an app searches by text, the pools share no words, so that a search has one best match.
"""

from __future__ import annotations

GENRES = ("jazz", "rock", "folk", "techno", "soul")
ARTISTS = {
    "Nova Tamarind": "jazz",
    "Quiet Ferry Club": "jazz",
    "Otto Brindle": "jazz",
    "Paper Foxes": "rock",
    "Iron Orchard": "rock",
    "Lena Stormquist": "rock",
    "Hollow Reed Choir": "folk",
    "Marten and Wren": "folk",
    "Sally Greenbough": "folk",
    "Kilo Vector": "techno",
    "Dr Pulsewidth": "techno",
    "Night Tram": "techno",
    "Velma Satinwood": "soul",
    "Brother Cobalt": "soul",
    "Honeydew Revue": "soul",
}
SONG_FIRST = ("Amber", "Broken", "Crimson", "Distant", "Endless", "Frozen", "Gentle", "Hidden", "Ivory", "Lonely")
SONG_SECOND = ("Anchor", "Balcony", "Compass", "Daydream", "Echo", "Feather", "Garland", "Horizon", "Island", "Jungle")

TODOS = {
    "Home": (
        "Fix the kitchen tap",
        "Wash the curtains",
        "Replace the hall lamp",
        "Clean the oven",
        "Paint the balcony door",
        "Order a new doormat",
        "Descale the kettle",
        "Sort the old magazines",
    ),
    "Work": (
        "Prepare the budget slides",
        "Review the hiring plan",
        "Update the team calendar",
        "Answer the audit questions",
        "Book the meeting room",
        "Draft the press release",
        "Archive the old contracts",
        "Test the backup system",
    ),
    "Garden": (
        "Plant the tulip bulbs",
        "Trim the hedge",
        "Water the tomatoes",
        "Repair the fence",
        "Rake the leaves",
        "Build a compost box",
        "Sow the carrots",
        "Clean the pond",
    ),
    "Travel": (
        "Renew the passport",
        "Compare train tickets",
        "Buy a plug adapter",
        "Reserve a hostel bed",
        "Pack the rain jacket",
        "Print the boarding pass",
        "Ask about the visa",
        "Download the city map",
    ),
    "Fitness": (
        "Run five kilometers",
        "Buy new trainers",
        "Stretch for ten minutes",
        "Book a swim lesson",
        "Try the climbing gym",
        "Plan the weekend hike",
        "Wash the yoga mat",
        "Log the weekly workouts",
    ),
}

# Notes whose content is worth telling somebody: title -> content with one drawn number.
FACTS = {
    "Wifi code": "The wifi code is pine{n}.",
    "Gate code": "The gate opens with {n}.",
    "Parking spot": "The car stands on level {d}, spot {n}.",
    "Locker number": "The locker is number {n}.",
    "Bus line": "Take bus {n} to the old mill.",
    "Spare key": "The spare key hangs on hook {d}.",
}
EVENTS = ("Lake picnic", "Birthday dinner", "Museum visit", "Ski weekend", "Barbecue night", "Canoe tour")
OTHER_NOTES = {
    "Books to read": "Two novels about the sea, one about bees.",
    "Soup recipe": "Leeks, potatoes, cream, a little nutmeg.",
    "Gift ideas": "A puzzle, a teapot, warm socks.",
    "Film list": "The comedy with the goose first.",
}
NEW_NOTES = {
    "Shopping list": ("milk and bread", "eggs and rice", "apples and tea", "butter and jam"),
    "Meeting plan": ("start at nine", "invite the whole team", "talk about the budget", "keep it short"),
    "Packing list": ("tent and torch", "boots and socks", "map and water", "soap and towel"),
    "Dream diary": ("a flying train", "a green cat", "an endless staircase", "a talking clock"),
    "Workout log": ("ten push-ups", "two miles of running", "an hour of rowing", "twenty squats"),
}

PAYMENT_NOTES = (
    "pizza",
    "taxi",
    "groceries",
    "concert tickets",
    "coffee",
    "rent share",
    "lunch",
    "gas",
    "flowers",
    "cinema",
)
MAIL_SUBJECTS = (
    "Notes from Tuesday",
    "Photos of the hike",
    "Question about the invoice",
    "New opening hours",
    "Your parcel",
    "Plans for summer",
    "Change of address",
    "The leaking roof",
    "Choir practice",
    "Holiday rota",
    "Lost umbrella",
    "Recipe for the pie",
)
MAIL_BODIES = (
    "Please have a look.",
    "Let me know what you think.",
    "More about it tomorrow.",
    "Just so that you know.",
)
TEXTS = (
    "I will be ten minutes late",
    "Dinner is at eight",
    "Please call me back tonight",
    "The parcel has arrived",
    "I left the keys at the desk",
    "See you at the station",
    "The meeting has moved to noon",
    "Thank you for the cake",
)
FOLDERS = {
    "photos": ("beach", "party", "garden", "sunset", "cat", "bridge", "snow", "market", "parade"),
    "recipes": ("bread", "curry", "salad", "pancakes", "stew", "noodles", "tart", "dumplings", "chili"),
    "letters": ("landlord", "bank", "school", "aunt", "tax", "club", "insurance", "library", "city"),
    "scores": ("waltz", "march", "sonata", "ballad", "hymn", "polka", "nocturne", "rondo", "etude"),
}
FILE_ENDINGS = {"photos": "jpg", "recipes": "txt", "letters": "txt", "scores": "pdf"}
