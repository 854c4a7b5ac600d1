"""Recipes: what is read comes back equal, and what is wrong is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersenet.errors import RecipeError
from tersenet.recipe import COMPANIONS, STEPS, Recipe, step_class
from tersenet.step import Companion, Step, snake_case

FULL = """
schema: 1
steps:
- fold_batch_norm
- prune_channels: {sparsity: 0.5, importance: l2, multiple_of: 16, skip: [linear]}
- train: {epochs: 6, with: [{soft_targets: {temperature: 4}}]}
- chain: {steps: [{quantize: {weights: int8, activations: int8}}, settle]}
"""


@pytest.mark.parametrize("name", sorted({**STEPS, **COMPANIONS}))
def test_every_known_name_is_a_class_of_that_name(name: str) -> None:
    cls = step_class(name)
    assert snake_case(cls.__name__) == name
    assert issubclass(cls, Step if name in STEPS else Companion)
    assert cls.summary, "methods prints it"
    assert cls.__doc__


def test_a_recipe_survives_yaml_and_comes_back_equal() -> None:
    recipe = Recipe.parse(FULL)
    assert [step.name for step in recipe.steps] == ["fold_batch_norm", "prune_channels", "train", "chain"]
    assert recipe.steps[2].companions[0].temperature == 4.0
    assert Recipe.parse(recipe.dump()) == recipe


def test_in_brief_a_recipe_is_the_same_without_its_defaults() -> None:
    recipe = Recipe.parse(
        "steps: [{prune_channels: {sparsity: 0.3, importance: l2, skip: [linear]}}, {train: {epochs: 3, "
        "with: [{soft_targets: {temperature: 4}}]}}, "
        "{chain: {steps: [{quantize: {weights: int4, activations: null}}]}}]"
    )
    brief = recipe.brief()
    assert Recipe.parse(brief) == recipe
    assert [word for word in ("sparsity", "skip", "epochs", "int4", "activations: null") if word not in brief] == []
    assert [word for word in ("importance", "temperature", "samples", "momentum") if word in brief] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [{prune_chanels: {}}]", "did you mean 'prune_channels'"),
        ("steps: [{nonsense: {}}]", "known: activation_penalty, binarise, chain"),
        ("steps: [{prune_channels: {sparsty: 0.5}}]", "did you mean 'sparsity'"),
        ("steps: [{prune_channels: {companions: 1}}]", "has no setting 'companions'"),
        ("steps: [{train: {companions: []}}]", "known: .*with"),
        ("steps: [{prune_channels: {sparsity: half}}]", "prune_channels.sparsity is 'half'"),
        ("steps: [{prune_channels: {sparsity: 1.5}}]", "prune_channels: sparsity must"),
        ("steps: [{prune_channels: {sparsity: true}}]", "is True"),
        ("steps: [{train: {epochs: 1.5}}]", "train.epochs is 1.5"),
        ("steps: [{train: {with: [{quantize: {}}]}}]", "is a step and cannot stand here"),
        ("steps: [{soft_targets: {}}]", "is a companion and cannot stand here"),
        ("steps: []", "at least one step"),
        ("steps: [{a: 1, b: 2}]", "must be written as"),
        ("steps: [{quantize: [1]}]", "must be a mapping"),
        ("schema: 7\nsteps: [settle]", "schema 7"),
        ("schema: 1\nstep: [settle]", "list 'steps'"),
        ("steps: [settle]\nextra: 1", "unknown key 'extra'"),
        ("steps: [", "not valid YAML in line 1"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("just text", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml cannot be read"):
        Recipe.read(tmp_path / "missing.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [{nonsense: {}}]")
    with pytest.raises(RecipeError, match=r"bad\.yaml: unknown step"):
        Recipe.read(path)


def test_own_steps_are_passed_in_python() -> None:
    from test_step import Widen

    recipe = Recipe.parse("steps: [{widen: {by: 3}}]", steps={"widen": Widen})
    assert recipe.steps == (Widen(by=3.0),)


def test_a_named_recipe_needs_no_file_and_is_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.read("int8") == Recipe.read(Path(__file__).parents[1] / "examples" / "int8.yaml")
    with pytest.raises(RecipeError, match=r"the recipe int9 cannot be read: .*; recipes that need no file: int8"):
        Recipe.read("int9")
    Path("int8").write_text("steps: [fold_batch_norm]", encoding="utf-8")
    assert len(Recipe.read("int8").steps) == 1  # a file of that name goes first
