"""Where a growing text is cut by its stop strings."""

import random

import pytest

from services.gateway.text.stops import split_at_stop


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", [], ("abc", "", False)),
        ("abc", ["x"], ("abc", "", False)),
        ("abcSTO", ["STOP"], ("abc", "STO", False)),
        ("abcSTOP and more", ["STOP"], ("abc", "", True)),
        ("STOP", ["STOP"], ("", "", True)),
        ("aab", ["aabaa"], ("", "aab", False)),
        ("aabaab", ["aabaaa"], ("aab", "aab", False)),
        ("one two", ["two", "one"], ("", "", True)),
        ("x\n", ["\n\n"], ("x", "\n", False)),
        ("ab", ["b", "abc"], ("a", "", True)),
        ("é€", ["€uro"], ("é", "€", False)),
    ],
)
def test_split_at_stop(text: str, stops: list[str], expected: tuple[str, str, bool]) -> None:
    assert split_at_stop(text, stops) == expected


def test_text_given_in_any_division_stops_at_the_same_place() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        stop = "".join(rng.choices("ab", k=rng.randint(1, 4)))
        shown, held, stopped = "", "", False
        for letter in text:
            new, held, stopped = split_at_stop(held + letter, [stop])
            shown += new
            if stopped:
                break
        assert shown + held == (text[: text.index(stop)] if stop in text else text)
        assert stopped == (stop in text)
