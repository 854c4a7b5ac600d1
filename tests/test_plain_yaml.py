"""YAML in recipes: numbers are numbers, words are words, and nothing is there twice."""

from __future__ import annotations

import math

import pytest

from tersenet import plain_yaml
from tersenet.errors import RecipeError
from tersenet.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("+2.5e+3", 2500.0), (".5", 0.5), ("7.", 7.0), ("1.0e-3", 0.001), ("-3", -3),
        ("010", 10), ("1:30", "1:30"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
        ("on", "on"), ("no", "no"), ("y", "y"), ("true", True), ("False", False), ("~", None), ("16x1", "16x1"),
        ("e5", "e5"), ("-", [None]), ("-.inf", -math.inf), ("'1e-3'", "1e-3"),
    ],
)  # fmt: skip
def test_words_and_numbers(text: str, value: object) -> None:
    read = plain_yaml.load(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("value", ["1e-3", "on", "true", "010", "1:30", "2024-01-01", "~", 1e-7, 0.001, 12, True, None])
def test_what_is_written_is_read_back(value: object) -> None:
    read = plain_yaml.load(plain_yaml.dump({"a": value}))["a"]
    assert read == value
    assert type(read) is type(value)


def test_a_recipe_takes_numbers_with_exponents() -> None:
    (step,) = Recipe.parse("steps: [{train: {epochs: 1, learning_rate: 1e-3}}]").steps
    assert step.learning_rate == 0.001
    assert Recipe.parse(Recipe((step,)).dump()).steps == (step,)


def test_a_recipe_takes_the_old_words_for_truth_values() -> None:
    (step,) = Recipe.parse("steps: [{quantize: {correct_bias: yes}}]").steps
    assert step.correct_bias is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps:\n- train: {epochs: 1}\nsteps: []", "line 3: the key 'steps' stands here a second time"),
        ("steps:\n- train: {epochs: 1, epochs: 2}", "line 2: the key 'epochs' stands here a second time"),
        ("steps:\n\t- settle", "line 2: a tab stands where only spaces may indent"),
        ("steps: [{train: {epochs: 1, learning_rate: .nan}}]", "not a number"),
    ],
)
def test_what_reads_well_and_means_something_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)
