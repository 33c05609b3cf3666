"""The vocabulary of the world. All of it is invented here; nothing is taken from AppWorld's data.

Where an app searches by text, the entries for one person share few words, so that a search has one best match.
"""

from __future__ import annotations

# Values of task parameters, by pool of people (see people.py): an evaluation task has words that no training task has.

# Artist -> genre.
ARTISTS = {
    "train": {
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
    },
    "dev": {
        "Rusty Mailbox": "blues",
        "Harlan Creed": "blues",
        "Seven Mile Porch": "blues",
        "Papaya Sound System": "reggae",
        "Winston Palmgrove": "reggae",
        "Tidal Postmen": "reggae",
    },
    "test": {
        "Trio Camaleon": "salsa",
        "Rosa Quintero": "salsa",
        "Los Faroles": "salsa",
        "Static Umbrella": "punk",
        "Vera Voltage": "punk",
        "The Loud Librarians": "punk",
    },
}
SONG_FIRST = (
    *("Amber", "Broken", "Crimson", "Distant", "Endless", "Frozen", "Gentle", "Hidden", "Ivory", "Lonely"),
    *("Marble", "Neon", "Silver"),
)
SONG_SECOND = (
    *("Anchor", "Balcony", "Compass", "Daydream", "Echo", "Feather", "Garland", "Horizon", "Island", "Jungle"),
    *("Kingdom", "Meridian", "Orbit"),
)

# Project -> titles of its tasks.
TODOS = {
    "train": {
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
    },
    "dev": {
        "Kitchen": (
            "Label the spice jars",
            "Defrost the freezer",
            "Sharpen the knives",
            "Replace the water filter",
            "Plan the dinner menu",
            "Polish the copper pans",
            "Sort the tea drawer",
            "Bake the rye bread",
        ),
        "Studies": (
            "Return the library books",
            "Learn the irregular verbs",
            "Finish the statistics sheet",
            "Print the lecture notes",
            "Email the tutor",
            "Enrol for the seminar",
            "Proofread the essay",
            "Copy the lab results",
        ),
        "Car": (
            "Change the winter tyres",
            "Check the oil level",
            "Vacuum the back seats",
            "Renew the insurance",
            "Wash the windscreen",
            "Replace the wiper blades",
            "Book the inspection",
            "Fill the washer tank",
        ),
    },
    "test": {
        "Wedding": (
            "Choose the flowers",
            "Confirm the caterer",
            "Send the invitations",
            "Rent the tables",
            "Write the speech",
            "Fit the suit",
            "Order the rings",
            "Rehearse the dance",
        ),
        "Band": (
            "Restring the guitar",
            "Mail the demo tape",
            "Rent the rehearsal room",
            "Design the tour poster",
            "Tune the drum kit",
            "Update the set list",
            "Fix the microphone stand",
            "Call the concert hall",
        ),
        "Pets": (
            "Brush the dog",
            "Buy the cat litter",
            "Clean the fish tank",
            "Visit the vet",
            "Refill the bird feeder",
            "Wash the dog blanket",
            "Trim the rabbit claws",
            "Order the hamster wheel",
        ),
    },
}

# Notes whose content is worth telling somebody: title -> content with drawn numbers.
FACTS = {
    "train": {
        "Wifi code": "The wifi code is pine{n}.",
        "Gate code": "The gate opens with {n}.",
        "Parking spot": "The car stands on level {d}, spot {n}.",
        "Locker number": "The locker is number {n}.",
        "Bus line": "Take bus {n} to the old mill.",
        "Spare key": "The spare key hangs on hook {d}.",
    },
    "dev": {
        "Bike lock": "The bike lock opens with {n}.",
        "Train seat": "The seat is number {n} in car {d}.",
        "Alarm password": "The alarm password is fern{n}.",
        "Storage unit": "The boxes are in unit {n}, row {d}.",
    },
    "test": {
        "Hotel room": "The hotel room is {n} on floor {d}.",
        "Safe combination": "The safe opens with {n}.",
        "Ferry pier": "The ferry leaves from pier {d}.",
        "Printer account": "The printer account is ink{n}.",
    },
}
EVENTS = {
    "train": ("Lake picnic", "Birthday dinner", "Museum visit", "Ski weekend", "Barbecue night", "Canoe tour"),
    "dev": ("Opera evening", "Wine tasting", "Bowling party"),
    "test": ("Zoo excursion", "Sushi lunch", "Sailing trip"),
}
OTHER_NOTES = {
    "Books to read": "Two novels about the sea, one about bees.",
    "Soup recipe": "Leeks, potatoes, cream, a little nutmeg.",
    "Gift ideas": "A puzzle, a teapot, warm socks.",
    "Film list": "The comedy with the goose first.",
}
# Title -> contents of notes to create.
NEW_NOTES = {
    "train": {
        "Shopping list": ("milk and bread", "eggs and rice", "apples and tea", "butter and jam"),
        "Meeting plan": ("start at nine", "invite the whole team", "talk about the budget", "keep it short"),
        "Packing list": ("tent and torch", "boots and socks", "map and water", "soap and towel"),
        "Dream diary": ("a flying train", "a green cat", "an endless staircase", "a talking clock"),
        "Workout log": ("ten push-ups", "two miles of running", "an hour of rowing", "twenty squats"),
    },
    "dev": {
        "Language goals": ("ten new words", "one podcast a day", "read a newspaper", "write a postcard"),
        "Repair costs": ("brakes and lamp", "a new saddle", "paint and screws", "two hours of work"),
        "Menu draft": ("pumpkin and sage", "noodles with lime", "a pear cake", "beans and corn"),
    },
    "test": {
        "Bird sightings": ("two herons", "a kingfisher", "nine geese", "an owl at dusk"),
        "Chess openings": ("the quiet game", "a bold gambit", "castle early", "trade the queens"),
        "Stage props": ("a red curtain", "three wooden crates", "a paper crown", "one old lantern"),
    },
}

PAYMENT_NOTES = {
    "train": (
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
    ),
    "dev": ("parking", "sandwiches", "book club", "haircut", "laundry", "ice cream"),
    "test": ("museum", "breakfast", "gardening", "phone bill", "gym pass", "stamps"),
}
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
# Folder -> names of its files, without the ending.
FOLDERS = {
    "train": {
        "photos": ("beach", "party", "garden", "sunset", "cat", "bridge", "snow", "market", "parade"),
        "recipes": ("bread", "curry", "salad", "pancakes", "stew", "noodles", "tart", "dumplings", "chili"),
        "letters": ("landlord", "bank", "school", "aunt", "tax", "club", "insurance", "library", "city"),
        "scores": ("waltz", "march", "sonata", "ballad", "hymn", "polka", "nocturne", "rondo", "etude"),
    },
    "dev": {
        "invoices": ("water", "power", "phone", "garage", "dentist", "plumber", "internet", "bakery", "florist"),
        "drawings": ("horse", "castle", "robot", "island", "dragon", "flower", "rocket", "whale", "tower"),
        "maps": ("harbor", "forest", "valley", "coast", "desert", "canal", "glacier", "village", "island"),
    },
    "test": {
        "poems": ("winter", "river", "mirror", "silence", "apples", "moon", "window", "shadow", "road"),
        "manuals": ("oven", "camera", "washer", "heater", "radio", "scooter", "blender", "router", "drill"),
        "posters": ("circus", "jazz", "theater", "marathon", "auction", "regatta", "flea", "opera", "lecture"),
    },
}
FILE_ENDINGS = {
    **{"photos": "jpg", "recipes": "txt", "letters": "txt", "scores": "pdf"},
    **{"invoices": "pdf", "drawings": "png", "maps": "pdf", "poems": "txt", "manuals": "pdf", "posters": "png"},
}
