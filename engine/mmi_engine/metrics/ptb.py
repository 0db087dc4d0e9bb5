"""Captions to words as the Penn treebank writes them, without Java.

Place in the flow: the first step of `captions.py`. The COCO caption evaluation runs Stanford's PTBTokenizer (3.4.1,
lower case) and then drops punctuation; this module follows that tokeniser's behaviour on the English that captions are
made of: contractions are split (``is n't``, ``man 's``, ``can not``), hyphenated words, numbers, times, fractions and
addresses stay whole, brackets become ``-lrb-`` and stay, known abbreviations keep their period. docs/eval.md says how
far the two agree.
"""

from __future__ import annotations

import functools
import re

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_SMART = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "--", "—": "--", "…": "...", "€": "$", "£": "#",
     "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "\u00a0": " ", "\u00ad": None}
)  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}  # fmt: skip
# Periods that belong to the word; those of the second line only before a number.
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|bros|ave|blvd|rd|mt|ft|gen|col|sgt|capt|lt|gov|sen|rep|rev|prof|"
    "ph\\.d|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|dept|est|univ|assn|messrs"
)
_TOKEN = re.compile(
    r"""
      (?P<url> https?://[^\s"<>]*[^\s"<>.,;:!?)'] | www\.[^\s"<>]*[^\s"<>.,;:!?)'] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ )
    | (?P<tag> [@\#][a-z_]\w* | </?[a-z][^<>\s]*> )
    | (?P<abbreviation> (?<![\w.'-])(?: (?:ABBREVIATIONS)\. (?!\w) | no\.(?=\s*\d) ) )
    | (?P<acronym> (?<![\w'-])[a-z]\.(?:[a-z]\.)+ | (?<![\w'-])(?:[a-z]\.)+(?=\s+\S|\s*$) )
    | (?P<split> (?<!\w)(?: cannot|gonna|gotta|wanna|lemme|gimme|'tis|'twas ) (?!\w) )
    | (?P<whole> (?<!\w)(?: o'clock|ma'am|o'[a-z]{3,}|d'ye|'n'|'em ) (?!\w) )
    | (?P<negation> (?<!\w)n't (?!\w) )
    | (?P<suffix> (?<=\w)'(?: s|m|d|ll|re|ve ) (?!\w) )
    | (?P<year> (?<![\w])'\d0?s (?!\w) )
    | (?P<number> [+-]? (?: \d+(?:[.,:/]\d+)+ | \.?\d+ ) (?: (?=[\s%$,.;:!?)'"&*=+]) | $ | (?= \.\s) ) )
    | (?P<word> \w+(?: (?!n't(?!\w)) [-./] \w+ | [-/](?=\w) )* )
    | (?P<dots> \.(?:\s*\.)+ )
    | (?P<many> [?!]+ )
    | (?P<dashes> -+ )
    | (?P<other> \S )
    """.replace("ABBREVIATIONS", _ABBREVIATIONS),
    re.VERBOSE | re.IGNORECASE,
)
_NEGATED = re.compile(r"(\w)n't(?!\w)")


@functools.lru_cache(maxsize=1 << 19)  # several metrics read the same captions
def tokenize(caption: str) -> tuple[str, ...]:
    """Lower-case words of a caption, punctuation left out."""
    text = caption.translate(_SMART).lower()
    if (
        text.isascii()
        and text.replace(" ", "").isalpha()
        and "nn" not in text
        and "mm" not in text
        and "tt" not in text
    ):
        return tuple(text.split())  # nothing to split or to drop
    text = _NEGATED.sub(r"\1 n't", text)
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "split":
            words += _SPLIT[token]
        elif kind == "other":
            words.append(_BRACKETS.get(token, token) if token != '"' else "''")
        elif kind == "dots":
            words.append("...")
        elif kind == "dashes":
            words.append(token)
        else:
            words.append(token)
    return tuple(word for word in words if word not in PUNCTUATION)
