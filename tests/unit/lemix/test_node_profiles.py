"""Profiles of nodes, as a person writes them."""

import pytest

from lemix.node_profiles import profiles_by_node
from shared.errors import ConfigurationError


def test_profiles_are_given_to_nodes_and_to_ranges_of_them() -> None:
    assert profiles_by_node(["0-2=llama2-13b@a100", "3=slow.json"]) == {
        0: "llama2-13b@a100",
        1: "llama2-13b@a100",
        2: "llama2-13b@a100",
        3: "slow.json",
    }


@pytest.mark.parametrize("written", [["llama2-13b@a100"], ["2-1=a@b"], ["1=a@b", "0-1=c@d"], ["1="]])
def test_a_wrong_profile_of_a_node_is_an_error_that_names_it(written: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        profiles_by_node(written)
    assert repr(written[-1]) in str(error.value)
