"""Tasks in Spotify."""

from __future__ import annotations

from random import Random

from .. import texts
from ..lives import World
from ..people import Person
from .base import ANSWER, DONE, Draw, Scenario, Turn, evaluate_question, login

STRAY_PLAYLIST = 'apis.spotify.create_playlist(title="Stray", access_token=token)'
STRAY_LIKE = """for song in apis.spotify.search_songs(page_limit=20):
    if not apis.spotify.show_song_privates(song_id=song["song_id"], access_token=token)["liked"]:
        apis.spotify.like_song(song_id=song["song_id"], access_token=token)
        break"""


def draw_artist(world: World, person: Person, rng: Random) -> Draw:
    library = [world.songs[title] for title in world.lives[person.email].library]
    artist = rng.choice(sorted({song.artist for song in library}))
    titles = sorted(song.title for song in library if song.artist == artist)
    return Draw({"artist": artist}, {"titles": titles})


def draw_count(world: World, person: Person, rng: Random) -> Draw:
    draw = draw_artist(world, person, rng)
    return Draw(draw.parameters, {}, len(world.lives[person.email].library) - len(draw.expected["titles"]))


SONG_COUNT = Scenario(
    id="songcount",
    difficulty=1,
    apps=("spotify",),
    kind="train",
    instructions=(
        "How many songs in my Spotify song library are not by <artist>?",
        "Tell me the number of songs in my Spotify song library that are not by <artist>.",
        "Count the songs in my song library on Spotify, except those by <artist>.",
    ),
    draw=draw_count,
    turns=(
        login("spotify"),
        Turn(
            "I count the songs in the library that are by other artists.",
            "songs = apis.spotify.show_song_library(access_token=token, page_limit=20)\n"
            'answer = len([s for s in songs if s["artists"][0]["name"] != "<artist>"])\nprint(answer)',
        ),
        ANSWER,
    ),
    evaluate=evaluate_question,
    harms=(STRAY_PLAYLIST,),
)


def draw_genre(world: World, person: Person, rng: Random) -> Draw:
    genres = [world.songs[title].genre for title in world.lives[person.email].library]
    genre = rng.choice(sorted(set(genres)))
    return Draw({"genre": genre}, {}, genres.count(genre))


GENRE_COUNT = Scenario(
    id="genrecount",
    difficulty=2,
    apps=("spotify",),
    kind="train",
    instructions=(
        "How many <genre> songs are in my Spotify song library?",
        "Tell me how many songs of the genre <genre> I have in my Spotify song library.",
        "Count the <genre> songs in my song library on Spotify.",
    ),
    draw=draw_genre,
    turns=(
        login("spotify"),
        Turn(
            "The library does not show genres, so I look at each song.",
            "songs = apis.spotify.show_song_library(access_token=token, page_limit=20)\n"
            'genres = [apis.spotify.show_song(song_id=s["song_id"])["genre"] for s in songs]\n'
            'answer = genres.count("<genre>")\nprint(answer)',
        ),
        ANSWER,
    ),
    evaluate=evaluate_question,
    harms=(STRAY_LIKE,),
)


def evaluate_likes(test, public_data, private_data, main_user, models, ground_truth_answer):
    titles = private_data.titles
    liked = {like.song.title for like in of_user(added(models, "spotify.SongLike"), "user", main_user)}  # noqa: F821
    with test("assert one of the songs was liked"):
        test.case(len(liked & set(titles)), ">=", 1)
    with test("assert all of the songs were liked"):
        test.case(set(titles) - liked, "==", set())
    with test("assert no other song was liked"):
        test.case(liked - set(titles), "==", set())
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        likes = {"added": len(titles)}
        songs = {"updated": len(titles), "fields": ["like_count"]}
        test.case(collateral(models, {"spotify.SongLike": likes, "spotify.Song": songs}), "==", {})  # noqa: F821


LIKE_ARTIST = Scenario(
    id="likeartist",
    difficulty=2,
    apps=("spotify",),
    kind="train",
    instructions=(
        "Like all the songs by <artist> in my Spotify song library.",
        "Give a like to every song of <artist> that is in my song library on Spotify.",
        "In my Spotify song library, like each song by <artist>.",
    ),
    draw=draw_artist,
    turns=(
        login("spotify"),
        Turn(
            "I pick the artist's songs from the library.",
            "songs = apis.spotify.show_song_library(access_token=token, page_limit=20)\n"
            'songs = [s for s in songs if s["artists"][0]["name"] == "<artist>"]\nprint(len(songs))',
        ),
        Turn(
            "I like each of them.",
            'for song in songs:\n    apis.spotify.like_song(song_id=song["song_id"], access_token=token)',
        ),
        DONE,
    ),
    evaluate=evaluate_likes,
    harms=(STRAY_LIKE, STRAY_PLAYLIST),
)


def draw_song(world: World, person: Person, rng: Random) -> Draw:
    life = world.lives[person.email]
    titles = {song.title for song in world.songs.values() if song.artist in texts.ARTISTS[person.pool]}
    title = rng.choice(sorted(titles - set(life.liked)))
    return Draw({"title": title}, {"titles": [title]})


def evaluate_like(test, public_data, private_data, main_user, models, ground_truth_answer):
    likes = of_user(added(models, "spotify.SongLike"), "user", main_user)  # noqa: F821
    with test("assert one song was liked"):
        test.case(len(likes), "==", 1)
    with test("assert the right song was liked"):
        test.case([like.song.title for like in likes], "==", private_data.titles)
    with test("assert the task was completed without an answer"):
        test.answer(given_answer(models), ground_truth_answer)  # noqa: F821
    with test("assert nothing else was changed"):
        songs = {"updated": 1, "fields": ["like_count"]}
        test.case(collateral(models, {"spotify.SongLike": {"added": 1}, "spotify.Song": songs}), "==", {})  # noqa: F821


LIKE_SONG = Scenario(
    id="likesong",
    difficulty=1,
    apps=("spotify",),
    kind="dev",
    instructions=(
        'Like the song "<title>" on Spotify.',
        'Find "<title>" on Spotify and like it.',
        'Give the song "<title>" a like on Spotify.',
    ),
    draw=draw_song,
    turns=(
        login("spotify"),
        Turn(
            "I search for the song and like it.",
            'songs = apis.spotify.search_songs(query="<title>")\n'
            'print(songs[0]["title"])\n'
            'apis.spotify.like_song(song_id=songs[0]["song_id"], access_token=token)',
        ),
        DONE,
    ),
    evaluate=evaluate_like,
    harms=(STRAY_LIKE, STRAY_PLAYLIST),
)

SCENARIOS = (SONG_COUNT, GENRE_COUNT, LIKE_ARTIST, LIKE_SONG)
