"""Words to hide and to look for: pairs of common words, made-up words, and random letters."""

import random
import string


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "able big black blue bright broad brown busy certain clean clear close cold common complete "
    "cool copper correct cotton dark deep different difficult direct dry early electric even exact "
    "fair famous far fast final fine flat free fresh full general gentle glad gold good grand gray "
    "great green happy hard heavy high hot large last late light liquid little long loud low main "
    "narrow near new next nice old open orange plain poor pretty quick quiet ready real red rich "
    "round safe sharp short silent silver simple single slow small smooth soft special square "
    "steel still straight strange strong sudden sure tall thick thin tiny true usual warm white "
    "whole wide wild winter wooden yellow young"
)
_NOUNS = _words(
    "animal answer apple arm baby ball bank beach bear bell bird board boat body book bottom box "
    "boy branch bread bridge brother building butter capital captain car card cat cause center "
    "century chair chief child church circle city class cloth cloud coast coat color copy corner "
    "country course cow cream crowd danger dance desert desk dinner doctor dog dollar door dream "
    "dress drink ear earth east edge egg enemy energy engine evening event eye face family farm "
    "father field figure finger fire fish flag floor flower food foot forest friend front fruit "
    "game garden girl glass grass ground group guide hair hand hat head heart hill history home "
    "horse hour house ice idea industry insect iron island job key king lady lake land language "
    "law leaf letter level lift line lion list machine magnet map market master meat metal middle "
    "milk mind minute money moon morning mother motion mountain mouth music nail name neck needle "
    "night noise north note number ocean office oil owner page paint paper party path pattern "
    "picture piece pilot plane planet plant pocket point port power price prize queen question "
    "race radio rain reason ring river road rock roof room root rope rose ruler sail salt sand "
    "school science sea season seat seed shape sheet shell ship shoe shop shore sign sister sky "
    "snow soil soldier song sound south space spot star station stone store storm story street "
    "student sugar suit summer sun table tail team test ticket tool town track trade train "
    "traveler tree trip truck valley village voice wagon wall watch water wave weather week west "
    "wheel wind window wing wire woman wood world yard year"
)
_SYLLABLES = [consonant + vowel for consonant in "bcdfjlmnprstvwz" for vowel in "aeiou"]
_LETTERS = 6


def draw_pair(draw: random.Random) -> str:
    """Two common words, for example "silver-river": one of about 30,000."""
    return f"{draw.choice(_ADJECTIVES)}-{draw.choice(_NOUNS)}"


def syllables_for(words: int) -> int:
    """How many syllables made-up words need for there to be more than so many of them."""
    syllables = 1
    while len(_SYLLABLES) ** syllables <= words:
        syllables += 1
    return syllables


def draw_made_up(draw: random.Random, syllables: int) -> str:
    """A word that can be spoken and means nothing, for example "lomeda" of three syllables.

    Those of as many syllables are of one length, so that none stands within another.
    """
    return "".join(draw.choices(_SYLLABLES, k=syllables))


def draw_coded(draw: random.Random) -> str:
    """Six random small letters."""
    return "".join(draw.choices(string.ascii_lowercase, k=_LETTERS))
