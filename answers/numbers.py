r"""Numbers as people and models write them: where they stand in a text, their exact value, one form for each value.

A comma, or a space in groups of three digits, separates thousands; a point separates decimals. `2 1/2` is 2.5; `2 5/3`
and `1 2` are no numbers. A currency or a degree sign does not count; `50%` is `50%`, neither 50 nor 0.5.
"""

import re
from decimal import Context, Decimal
from fractions import Fraction

MAX_CHARS = 400  # a longer text is no number
MAX_EXPONENT = 200
MAX_PLAIN_CHARS = 40  # a longer number is written in its shortest form

_ASCII = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
_ASCII |= dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " ")
_ASCII |= {0xFF0B: "+", 0xFF0E: ".", 0xFF0C: ",", 0xFF05: "%", 0xFF0F: "/", 0xFF1D: "=", 0xFF04: "$"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_VULGAR = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅛": "1/8",
    "⅜": "3/8",
    "⅝": "5/8",
    "⅞": "7/8",
}

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_EXPONENT = r"(?:[eE]([-+]?\d{1,3})| ?(?:\\times|\\cdot|[\u00d7\u00b7\u22c5*x]) ?10\^\{?([-+]?\d{1,3})\}?)"
_DECIMAL = re.compile(rf" ?([-+]?) ?(?:({_INTEGER}(?:\.\d*)?|\.\d+){_EXPONENT}?|10\^\{{?([-+]?\d{{1,3}})\}}?) ?")
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)(?=[ \\]))? ?"
    r"(?:\\frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))|([^/{}]+)/([^/{}]+))"
)
_SIGNED = re.compile(
    r"(?:[A-Za-z] ?= ?)?[€£¥]? ?(?P<sign>[-+]?) ?[€£¥]? ?(?P<number>(?![-+]).*?)"
    r"(?: ?(?:(?P<percent>%)|\\degree|°|\^ ?\{?(?:\\circ|°) ?\}?|[€£¥]))? ?\.?",
    re.DOTALL,
)

# Looks like a number and is none: a date, a version, a code point, a name with digits, the number of a list's line.
_NO_NUMBER = (
    r"\b\d{4}-\d{1,2}-\d{1,2}\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b|\b\d+(?:\.\d+){2,}|\bU\+[0-9A-Fa-f]{4,6}\b"
    r"|(?<![\\A-Za-z_])[A-Za-z_]+\d\w*(?:\.\d+)*|(?m:^)[ \t]*\d{1,2}[.)][ \t]+(?=\S)"
)
# A sign belongs to the number unless it is a subtraction: after a word, a closed bracket or a point.
_IN_TEXT = re.compile(
    rf"{_NO_NUMBER}|(?P<number>(?:(?<![\w)\]}}.%])[-+])?(?:\\?\$|[€£¥])?(?:(?<=\$)[-+])?(?:"
    r"(?:\d+ ?)?\\[dt]?frac(?:\{[-+]?\d+\}|\d)(?:\{[-+]?\d+\}|\d)"
    r"|\d+ \d+/\d+(?!\d|/|\.\d)|10\^(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3}(?!\w))"
    rf"|(?:{_INTEGER}(?!\d)(?:\.\d+)?|(?<![\w.])\.\d+)(?:{_EXPONENT}(?!\w)|/\d+(?!\.?\d))?))"
)


def to_ascii(text: str) -> str:
    r"""Write digits, signs and spaces of all scripts in ASCII, and LaTeX's thousands such as `1{,}000` as `1,000`."""
    if not text.isascii():
        text = re.sub(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
        text = re.sub(f"(?<=\\d)(?=[{''.join(_VULGAR)}])", " ", text)
        text = text.translate(_ASCII | {ord(sign): fraction for sign, fraction in _VULGAR.items()})
        text = re.sub(r"[^\x00-\x7f]", lambda found: str(int(found[0])) if found[0].isdecimal() else found[0], text)
    text = re.sub(r"\{,\}|,\\!", ",", text)
    return re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d|\\[dt]?frac)", " ", text)


def find_numbers(text: str) -> list[str]:
    """Return the numbers of a text, as they are written there."""
    return [match["number"] for match in _IN_TEXT.finditer(to_ascii(text)) if match["number"]]


def read_number(text: str) -> str | None:
    """Return the form of a number's value, None for other text. Takes text without decoration, in ASCII."""
    signed = _SIGNED.fullmatch(text) if len(text) <= MAX_CHARS else None
    value = signed and _value(signed["number"])
    if not signed or value is None:
        return None
    return write_number(-value if signed["sign"] == "-" else value) + (signed["percent"] or "")


def write_number(value: Fraction) -> str:
    """Write a value as a person would: as a decimal if that ends, else as a fraction."""
    context = Context(prec=10 * MAX_CHARS)
    fraction = str(value)
    if 10 ** (2 * MAX_CHARS) % value.denominator:
        return fraction  # such as 1/3
    decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)
    plain, scientific = f"{decimal:f}", f"{decimal:e}".replace("e+", "e")
    return plain if len(plain) <= MAX_PLAIN_CHARS else min(plain, scientific, fraction, key=len)


def _value(text: str) -> Fraction | None:
    fraction = _FRACTION.fullmatch(text)
    if not fraction:
        return _decimal_value(text)
    numerator, denominator = (_decimal_value(part) for part in fraction.groups()[1:] if part is not None)
    if numerator is None or not denominator:
        return None
    if not fraction["whole"]:
        return numerator / denominator
    proper = 0 < numerator < denominator and numerator.denominator == denominator.denominator == 1
    return int(fraction["whole"]) + numerator / denominator if proper else None


def _decimal_value(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if not match:
        return None
    sign, mantissa, *exponents = match.groups()
    exponent = int(next((e for e in exponents if e), 0))
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(re.sub("[, ]", "", mantissa or "1")) * Fraction(10) ** exponent
    return -value if sign == "-" else value
