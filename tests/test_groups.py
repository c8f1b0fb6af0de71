import pytest
from hypothesis import given
from hypothesis import strategies as st

from twa_merge.errors import UserError
from twa_merge.groups import group_parameters, layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.encoder.layer.3"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings"),
        ("vit.embeddings.cls_token", "vit.embeddings"),
        ("classifier.weight", "classifier"),
        ("logit_scale", "logit_scale"),
        ("embed", "embed"),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


names = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1", "embeddings", "weight"]), min_size=1, max_size=4).map(".".join),
    unique=True,
    min_size=1,
)


@given(names, st.sampled_from(["model", "layer", "tensor"]))
def test_groups_partition_the_parameters(parameters, granularity):
    groups = group_parameters(parameters, granularity)
    assert sorted(name for members in groups.values() for name in members) == sorted(parameters)
    assert all(groups.values())


def test_patterns_take_the_first_match_and_leave_a_rest():
    groups = group_parameters(["a.x", "a.y", "b.x", "c"], ["a.*", "*.x"])
    assert groups == {"a.*": ("a.x", "a.y"), "*.x": ("b.x",), "rest": ("c",)}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"'z\*' matches no parameter"):
        group_parameters(["a"], ["a", "z*"])


def test_unknown_granularity_lists_the_known():
    with pytest.raises(UserError, match=r"model, layer, tensor.*got 'block'"):
        group_parameters(["a"], "block")
