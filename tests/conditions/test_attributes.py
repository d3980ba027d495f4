"""Facts as vectors: what is told apart, what is absent, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from medgen.conditions.attributes import Attribute, encode_attributes, far_from_training, fit_attribute, fit_spacing
from medgen.types import BadInputError


def test_columns_are_recognized():
    view = fit_attribute("view", ["PA", "AP", "PA"])
    assert (view.kind, view.values, view.features) == ("category", ("AP", "PA"), 2)
    age = fit_attribute("age", [str(value) for value in range(20, 60)])
    assert age.kind == "number"
    assert (age.mean, age.std) == pytest.approx((39.5, math.sqrt((40**2 - 1) / 12)))
    stage = fit_attribute("stage", ["1", "2", "3", "1"])  # few numbers are classes
    assert stage.kind == "category"
    embedding = fit_attribute("embedding", ["[0.5, 1.0, 2.0]", "[1, 2, 3]"])
    assert (embedding.kind, embedding.width) == ("vector", 3)


def test_vectors_tell_values_apart_and_are_never_zero():
    attributes = {
        "view": fit_attribute("view", ["PA", "AP"]),
        "age": Attribute("number", mean=50.0, std=10.0),
        "spacing": fit_spacing([(1.0, 1.0, 2.0), (1.0, 1.0, 0.5)]),
    }
    first = encode_attributes(attributes, {"view": "PA", "age": "50", "spacing": "[1, 1, 1]"})
    assert first["view"].tolist() == [0, 1]
    assert first["age"].tolist() == pytest.approx([1, 0, 0, 1, 0, 1, 0, 1, 0, 1])
    assert first["spacing"].tolist() == [1, 0, 0, 0]  # the geometric mean of all edges
    other = encode_attributes(attributes, {"age": "51", "spacing": "[2, 1, 0.5]"})
    assert not other["view"].any()
    assert other["spacing"].tolist() == [1, 1, 0, -1]
    assert (other["age"] - first["age"]).abs().max() > 0.05
    assert all(len(vector) == attributes[name].features for name, vector in other.items())


def test_numbers_over_the_whole_range_keep_apart():
    age = Attribute("number", mean=50.0, std=20.0)
    rows = torch.stack([age.encode(value, name="age") for value in range(0, 101, 2)])
    distances = torch.cdist(rows, rows) + 10 * torch.eye(len(rows))
    assert distances.min() > 0.1


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (Attribute("category", values=("AP", "PA")), "LL", "view: expected one of AP, PA, .* got 'LL'"),
        (Attribute("number"), "old", "view: expected a finite number"),
        (Attribute("number"), "nan", "view: expected a finite number"),
        (Attribute("spacing", mean=1.0, width=3), "[1, 1]", r"view: expected 3 number\(s\), got 2"),
        (Attribute("spacing", mean=1.0, width=2), "[1, -1]", "view: expected positive lengths in mm"),
        (Attribute("vector", width=2), "[0, 0]", "view: expected a vector that is not all zeros"),
    ],
)
def test_values_that_cannot_be_are_refused(attribute, value, message):
    with pytest.raises(BadInputError, match=message):
        attribute.encode(value, name="view")


def test_a_number_is_far_beyond_four_standard_deviations():
    age = Attribute("number", mean=50.0, std=10.0)
    assert [value for value in ("9.9", "10", "50", "90", "90.5") if far_from_training(age, value)] == ["9.9", "90.5"]
    assert far_from_training(age, "400") == "mean 50, standard deviation 10"
    assert far_from_training(Attribute("category", values=("400",)), "400") == ""
    assert far_from_training(Attribute("spacing", mean=1.0, width=2), "[400, 1]") == ""


def test_columns_that_tell_nothing_are_refused():
    with pytest.raises(BadInputError, match="attribute 'site': expected a column with at least two values"):
        fit_attribute("site", ["a", "a"])
    with pytest.raises(BadInputError, match=r"at least two values, got \['60', '60.0'\], which tells no scan from"):
        fit_attribute("age", ["60", "60.0", "60"])
    with pytest.raises(BadInputError, match=r"at least two values, got \[\]"):
        fit_attribute("empty", [])
    with pytest.raises(BadInputError, match="attribute 'note': expected numbers or at most 64 categories, got 100"):
        fit_attribute("note", [f"text {index}" for index in range(100)])


def test_one_voxel_size_teaches_nothing_and_is_refused():
    with pytest.raises(BadInputError, match=r"'spacing': expected scans of different .*, got 1 x 1 x 3 mm everywhere"):
        fit_spacing([(1.0, 1.0, 3.0), (1.0, 1.001, 3.0), (1.0, 1.0, 2.998)])
    assert fit_spacing([(1.0, 1.0, 3.0), (1.0, 1.0, 3.1)]).width == 3
