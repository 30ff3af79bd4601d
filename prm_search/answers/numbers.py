"""Numbers as answers write them: decimals, fractions, mixed and scientific ones, with currency, percent or a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 100  # characters; what is longer is left alone
LARGEST = 400  # power of ten; what is larger is left alone

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_CURRENCIES = {"$": "dollar", "US$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_TEN = r"10\s*\^\s*(?:\{\s*(?P<braced>[-+]?[0-9]+)\s*\}|(?P<bare>[-+]?[0-9]+))"
#: One number, in the longest form that is there; `value_of` reads a match.
CORE = (
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\s+|(?=\s*\\))\s*"
    r"(?:\\[dt]?frac\{(?P<over>[0-9]+)\}\{(?P<under>[0-9]+)\}|(?P<part>[0-9]+)/(?P<of>[0-9]+))"
    rf"|\\[dt]?frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}"
    rf"|{_TEN.replace('braced', 'braced1').replace('bare', 'bare1')}"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"(?:[eE](?P<power>[-+]?[0-9]+)(?!\w)|\s*(?:\\times|\\cdot|[\u00d7\u00b7*x])\s*{_TEN}|/(?P<denominator>{_DECIMAL}))?)"
)
_ANSWER = re.compile(
    rf"(?P<sign>[-+])?\s*(?P<currency>US\$|[$€£¥₹])?\s*(?P<inner>[-+])?(?P<core>{CORE})(?P<rest>.*)", re.DOTALL
)
_LABEL = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{([^{}]*)\}")
_DEGREE = re.compile(r"\^\s*\{?\\circ\}?|\\degree|°")
_WORD = re.compile(r"[A-Za-z]+(?:\^\{?[23]\}?)?")

_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
# Words behind a number that make another of it, or another answer; what is behind them is no unit.
_NO_UNITS = frozenset({
    "and", "or", "to", "over", "by", "mod", "plus", "minus", "times", "than", "is", "if", "for", "from", "with",
    "squared", "cubed", "factorial", "root", "negative", "positive", "more", "less", "fewer", "greater", "least",
    "most", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths",
    "sixth", "sixths", "eighth", "eighths", "tenth", "tenths", "hundredth", "hundredths", "choose", "base",
    "remainder", "infinity", "inf", "pi", "theta", "alpha", "beta", "phi", "sqrt", "sin", "cos", "tan", "sec", "csc",
    "cot", "log", "exp", "abs", "min", "max", "gcd", "lcm", "frac",
})  # fmt: skip
# Units shorter than a word; any other letter or two is a variable.
_SHORT = frozenset({
    "cm", "mm", "km", "kg", "mg", "ml", "ft", "in", "hr", "lb", "oz", "mi", "yd", "hz", "ms", "kw", "kj", "kb", "mb",
    "gb", "tb",
})  # fmt: skip
_LETTERS = frozenset({"m", "s", "g", "h", "L", "J", "N", "W"})
_SPELLINGS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km",
    "kilometre": "km", "metre": "meter", "m": "meter", "L": "liter", "kilogram": "kg", "gram": "g", "milligram": "mg",
    "milliliter": "ml", "millilitre": "ml", "litre": "liter", "foot": "ft", "feet": "ft", "inch": "in", "inche": "in",
    "hour": "hr", "h": "hr", "minute": "min", "second": "sec", "s": "sec", "lb": "pound", "ounce": "oz", "mile": "mi",
    "yard": "yd", "usd": "dollar", "eur": "euro", "gbp": "pound", "deg": "degree",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number with what stands around it.

    Attributes:
        value: exact; of a percentage, its hundredths.
        unit: in one spelling, "" for none; a currency is one.
        percent: it is a percentage.
        in_words: the unit stands in plain words, not in LaTeX or as a sign.
    """

    value: Fraction
    unit: str = ""
    percent: bool = False
    in_words: bool = False


def plain_characters(text: str) -> str:
    """Text with ASCII minus signs, fractions and exponents in the place of Unicode's own."""
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\uff0d", "-")
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    for character, fraction in _VULGAR.items():
        text = re.sub(rf"(?<=[0-9])\s*{character}", f" {fraction}", text).replace(character, fraction)
    return text


def parse_number(text: str) -> Number | None:
    """The number that a whole answer spells; None for other text, and for a number with more about it than a unit."""
    if len(text) > LONGEST:
        return None
    match = _ANSWER.fullmatch(plain_characters(text).strip())
    if match is None or (match["sign"] and match["inner"]):
        return None
    value = value_of(match)
    if value is None:
        return None
    value = -value if "-" in (match["sign"], match["inner"]) else value
    currency = _CURRENCIES.get(match["currency"] or "", "")
    rest = match["rest"].strip().rstrip(".").strip()
    if re.fullmatch(r"\\?%|percent|per cent", rest):
        return None if currency else Number(value, percent=True)
    if not rest:
        return Number(value, currency)
    scaled_unit = _unit(rest, apart=match["rest"][:1].isspace())
    if scaled_unit is None or (currency and scaled_unit[1] not in ("", currency)):
        return None
    scale, unit = scaled_unit
    return Number(value * scale, currency or unit, in_words=not currency and rest[0].isalpha() and bool(unit))


def value_of(match: re.Match[str]) -> Fraction | None:
    """Return the number of a match of CORE, without its sign; None for a division by 0 or too large a power."""
    part = match.groupdict()
    numerator, denominator = part["over"] or part["part"], part["under"] or part["of"]
    try:
        if part["whole"] is not None:
            if int(numerator) >= int(denominator):
                return None  # no mixed number
            return int(part["whole"].replace(",", "")) + Fraction(int(numerator), int(denominator))
        if part["top"] is not None:
            return _decimal(part["top"]) / _decimal(part["bottom"])
        value = Fraction(1) if part["decimal"] is None else _decimal(part["decimal"])
        if part["denominator"] is not None:
            return value / _decimal(part["denominator"])
    except ZeroDivisionError:
        return None
    power = next((part[n] for n in ("power", "braced", "bare", "braced1", "bare1") if part[n] is not None), "0")
    if len(power) > 4 or abs(int(power)) > LARGEST:
        return None
    return value * Fraction(10) ** int(power)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _unit(rest: str, apart: bool) -> tuple[int, str] | None:
    """Return what stands behind a number: its scale (a "million"), and a unit in one spelling; None for anything else.

    Args:
        rest: not empty.
        apart: blanks stand between the number and this; without them only a short unit is one ("5cm", not "5abc").
    """
    rest_is_letters = rest[0].isalpha()
    labelled = _LABEL.search(rest) is not None  # then one letter is a unit, otherwise a variable
    rest = _DEGREE.sub(" degree ", _LABEL.sub(r" \1 ", rest)).replace("/", " per ").strip().rstrip(".")
    unit_words = rest.split()
    if not apart and rest_is_letters and unit_words[0].strip(".").lower() not in _SHORT:
        return None
    scale, unit, raised = 1, list[str](), ""
    for word in unit_words:
        bare = re.sub(r"\^\{?([23])\}?$", "", word.strip("."))
        letter = len(bare) == 1 and (labelled or (apart and bare in _LETTERS))
        if not letter:
            word, bare = word.strip(".").lower(), bare.lower()
        one = bare.removesuffix("s") if len(bare) > 3 and not bare.endswith("ss") else bare
        if not _WORD.fullmatch(word) or bare in _NO_UNITS:
            return None
        if len(bare) < 3 and not (labelled or letter or bare in _SHORT):
            return None
        if one in _SCALES and not unit:
            scale *= _SCALES[one]
        elif bare in ("square", "sq", "cubic"):
            raised = "^3" if bare == "cubic" else "^2"
        elif bare == "of" and unit:
            unit.append(bare)
        else:
            power = raised or ("^" + word[len(bare) :].strip("^{}") if word != bare else "")
            unit.append(_SPELLINGS.get(one, one) + power)
            raised = ""
    return None if raised else (scale, " ".join(unit))
