"""docs/options.md is what the Config classes say."""

import dataclasses

import generate_options
import pytest

from agents import REGISTRY


def test_the_page_is_up_to_date() -> None:
    assert generate_options.FILE.read_text() == generate_options.page(), "run python docs/generate_options.py"


@pytest.mark.parametrize("algorithm", REGISTRY)
def test_every_option_is_declared_once_where_the_page_looks_for_it(algorithm: str) -> None:
    config = REGISTRY[algorithm].Config
    said = {}
    for base in reversed([config, *generate_options.ancestors(config)]):
        said |= generate_options.declared(base)
    assert said.keys() == {field.name for field in dataclasses.fields(config)}
    assert all(said.values())
