"""Which weights made which tokens."""

import pytest

from services.gateway.version_ranges import TokenVersions


@pytest.mark.parametrize(
    ("versions", "ranges"),
    [
        ([], []),
        ([3], [(3, 0, 0)]),
        ([3, 3, 3], [(3, 0, 2)]),
        ([3, 3, 5, 5, 6], [(3, 0, 1), (5, 2, 3), (6, 4, 4)]),
        ([3, 5, 3], [(3, 0, 0), (5, 1, 1), (3, 2, 2)]),
    ],
)
def test_tokens_in_a_row_of_one_version_are_one_range(
    versions: list[int], ranges: list[tuple[int, int, int]]
) -> None:
    token_versions = TokenVersions()
    for version in versions:
        token_versions.add(version)
    assert list(token_versions.ranges) == ranges
