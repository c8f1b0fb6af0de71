"""The writer's promise: what is written is the float64 merge of the originals, whatever their spelling and sharding."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factory
from twa_merge import mixing
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.groups import group_parameters
from twa_merge.mixing import MixingWeights
from twa_merge.writer import write

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
    "vit": "ViTForImageClassification",
    "t5": "T5ForConditionalGeneration",
    "clip_vision": "CLIPVisionModel",
    "llama": "LlamaForCausalLM",
    "llama_tied": "LlamaForCausalLM",
    "resnet": "ResNetForImageClassification",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}
WEIGHTS = [0.5, 0.2, 0.3]


def sources(kind, folder, **options):
    """Return a soup's arguments: `tiny_resnet` has no config, so its files are given."""
    return factory.make_soup(kind, folder, **options)


def reference(states, weights, name):
    """Return the float64 merge of one tensor, summed in the order of the checkpoints."""
    total = torch.zeros_like(states[0][name], dtype=torch.float64)
    for state, weight in zip(states, weights, strict=True):
        total.add_(state[name].double(), alpha=weight)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", [*CLASSES, "tiny_resnet"])
def test_average_is_the_rounded_float64_reference(tmp_path, kind, sharded, dtype):
    folders = sources(kind, tmp_path, dtype=dtype, sharded=sharded)
    soup = Soup(folders)
    weights = mixing.given(WEIGHTS, soup.labels)
    write(soup, weights, tmp_path / "out")
    states = [factory.read_tensors(folder) for folder in folders]
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == states[0].keys()
    for name, value in merged.items():
        assert value.dtype == states[0][name].dtype
        if value.is_floating_point():
            expected = reference(states, weights.table[0].tolist(), name).to(value.dtype)
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("spelling", ["old", "mixed"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit", "t5"])
def test_the_merge_does_not_depend_on_the_spelling(tmp_path, kind, spelling):
    import transformers

    new, other = tmp_path / "new", tmp_path / spelling
    for folder, how in ((new, "new"), (other, spelling)):
        soup = Soup(factory.make_soup(kind, folder, spelling=how, sharded=how == "mixed"))
        write(soup, mixing.given(WEIGHTS, soup.labels), folder / "out")
    cls = getattr(transformers, CLASSES[kind])
    a, b = (cls.from_pretrained(folder / "out").state_dict() for folder in (new, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


SPELLINGS = [(kind, "new") for kind in ("clip_vision", "llama", "llama_tied", "resnet")]
SPELLINGS += [(kind, how) for kind in ("gpt2", "bert", "vit", "t5") for how in ("new", "old", "mixed")]


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
@pytest.mark.parametrize(("kind", "spelling"), SPELLINGS)
def test_rows_reach_the_parameters_that_the_module_loads(tmp_path, kind, spelling, granularity):
    """Every parameter of the reloaded model is the merge by its own row, computed from reloaded members."""
    import transformers

    cls = getattr(transformers, CLASSES[kind])
    folders = factory.make_soup(kind, tmp_path, spelling=spelling)
    members = [cls.from_pretrained(folder).state_dict() for folder in folders]
    soup = Soup(folders)
    names = [name for name, _ in cls.from_pretrained(folders[0]).named_parameters()]
    groups = group_parameters(names, granularity)
    torch.manual_seed(0)
    table = torch.rand(len(groups), 3, dtype=torch.float64)
    table /= table.sum(dim=1, keepdim=True)
    write(soup, weights := MixingWeights(table, groups, soup.labels), tmp_path / "out")
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in model.named_parameters():
        expected = reference(members, weights.row(name).tolist(), name).float()
        assert torch.equal(parameter.detach(), expected), name


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_merge_reloads_without_missing_or_unexpected_keys(tmp_path, kind, sharded):
    import transformers

    soup = Soup(factory.make_soup(kind, tmp_path, sharded=sharded))
    shard = 4000 if sharded else 10**9
    write(soup, mixing.uniform(soup.labels), tmp_path / "out", max_shard_bytes=shard)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == sharded
    _, info = getattr(transformers, CLASSES[kind]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.mark.parametrize("kind", [*CLASSES, "tiny_resnet"])
def test_a_one_hot_table_gives_that_checkpoint_back(tmp_path, kind):
    folders = factory.make_soup(kind, tmp_path / "a", dtype=torch.float32)
    half = factory.make_soup(kind, tmp_path / "b", dtype=torch.bfloat16)
    soup = Soup([folders[0], half[1], folders[2]])
    write(soup, mixing.one_hot(1, soup.labels), tmp_path / "out")
    merged, own = load_file(tmp_path / "out/model.safetensors"), factory.read_tensors(half[1])
    assert merged.keys() == own.keys()
    for name, value in own.items():
        assert merged[name].dtype == value.dtype and torch.equal(merged[name], value), name


@pytest.mark.parametrize("kind", ["gpt2", "resnet"])
def test_equal_checkpoints_merge_to_themselves(tmp_path, kind):
    folders = factory.make_soup(kind, tmp_path, n=3, scale=0.0)
    soup = Soup(folders)
    write(soup, mixing.given([0.3, 0.3, 0.4], soup.labels), tmp_path / "out")
    merged, own = load_file(tmp_path / "out/model.safetensors"), factory.read_tensors(folders[0])
    assert all(torch.equal(merged[name], own[name]) for name in own if own[name].is_floating_point())


def test_permuting_checkpoints_permutes_columns(tmp_path):
    folders = factory.make_soup("gpt2", tmp_path, n=4)
    weights = [0.4, 0.3, 0.2, 0.1]
    order = [2, 0, 3, 1]
    for name, arguments, row in (
        ("a", folders, weights),
        ("b", [folders[i] for i in order], [weights[i] for i in order]),
    ):
        soup = Soup(arguments)
        write(soup, mixing.given(row, soup.labels), tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in a:
        one_rounding = torch.finfo(torch.float32).eps * a[name].abs().clamp_min(1e-30)
        assert ((a[name] - b[name]).abs() <= one_rounding).all(), name


def test_the_output_dtype_is_the_one_asked_for(tmp_path):
    soup = Soup(factory.make_soup("gpt2", tmp_path))
    write(soup, mixing.uniform(soup.labels), tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("weights", [[0.5, 0.5, 0], [0, 0, 1]])
def test_members_without_weight_are_not_read(tmp_path, weights):
    folders = factory.make_soup("bert", tmp_path)
    column = weights.index(0)
    state = factory.read_tensors(folders[column])
    state = {name: torch.full_like(t, float("nan")) if t.is_floating_point() else t for name, t in state.items()}
    save_file(state, folders[column] / "model.safetensors", {"format": "pt"})
    soup = Soup(folders)
    write(soup, mixing.given(weights, soup.labels), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert all(t.isfinite().all() for t in merged.values() if t.is_floating_point())


def test_a_nan_names_checkpoint_and_tensor_and_leaves_nothing(tmp_path):
    folders = factory.make_soup("bert", tmp_path / "soup")
    state = factory.read_tensors(folders[1])
    name = next(n for n in state if n.endswith("query.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, folders[1] / "model.safetensors", {"format": "pt"})
    soup = Soup(folders)
    with pytest.raises(UserError, match=rf"member-1: tensor '{name}' holds NaN"):
        write(soup, mixing.uniform(soup.labels), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["soup"]


def test_infinities_that_all_share_are_kept(tmp_path):
    """Masks are such buffers; an infinity of one checkpoint alone is damage."""
    for k in range(3):
        (tmp_path / str(k)).mkdir()
        mask = torch.full((4, 4), -torch.inf).triu(1)
        save_file({"mask": mask, "weight": torch.full((4,), float(k))}, tmp_path / str(k) / "model.safetensors")
    soup = Soup([tmp_path / str(k) for k in range(3)])
    for name, table in (("uniform", mixing.uniform(soup.labels)), ("one", mixing.one_hot(1, soup.labels))):
        write(soup, table, tmp_path / name)
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["mask"], mask)
    mask[0, 0] = -torch.inf
    save_file({"mask": mask, "weight": torch.zeros(4)}, tmp_path / "2/model.safetensors")
    with pytest.raises(UserError, match="2: tensor 'mask' holds NaN or infinity"):
        write(soup, mixing.uniform(soup.labels), tmp_path / "damaged")


def test_side_files_of_any_tokenizer_are_there(tmp_path):
    members = factory.make_soup("bert", tmp_path / "soup")
    for name in ("source.spm", "bpe.codes", "prophetnet.tokenizer", "chat_template.jinja"):
        (members[0] / name).write_text("x")
    (members[0] / "training_args.bin").write_text("x")
    soup = Soup(members)
    write(soup, mixing.uniform(soup.labels), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"source.spm", "bpe.codes", "prophetnet.tokenizer", "chat_template.jinja"}
    assert "training_args.bin" not in names


def test_integers_must_be_equal_but_counters_need_not(tmp_path):
    folders = factory.make_soup("tiny_resnet", tmp_path)  # num_batches_tracked differs
    soup = Soup(folders)
    write(soup, mixing.uniform(soup.labels), tmp_path / "out")
    for k, folder in enumerate(folders):
        state = factory.read_tensors(folder) | {"table": torch.tensor([1, 2, k])}
        save_file(state, folder / "model.safetensors")
    soup = Soup(folders)
    with pytest.raises(UserError, match=r"integer tensor 'table' differs in .*member-1"):
        write(soup, mixing.uniform(soup.labels), tmp_path / "out2")


def test_a_table_is_tied_to_its_checkpoints_and_their_order(tmp_path):
    folders = factory.make_soup("bert", tmp_path)
    soup = Soup(folders)
    write(soup, mixing.given(WEIGHTS, soup.labels), tmp_path / "out")
    table = MixingWeights.load(tmp_path / "out")
    write(Soup(folders), table, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="order differs"):
        write(Soup([folders[1], folders[0], folders[2]]), table, tmp_path / "no")
    with pytest.raises(UserError, match="for 3 checkpoints"):
        write(Soup(folders[:2]), table, tmp_path / "no")


def test_numbers_beyond_float16_are_named_and_nothing_is_written(tmp_path):
    members = factory.make_soup("bert", tmp_path / "soup")
    for member in members:
        state = factory.read_tensors(member)
        state["classifier.bias"] = torch.tensor([70000.0, 0.0])
        factory.write_tensors(state, member)
    soup = Soup(members)
    for weights in (mixing.uniform(soup.labels), mixing.one_hot(0, soup.labels)):
        with pytest.raises(UserError, match=r"'classifier.bias': the merge holds numbers beyond 65504"):
            write(soup, weights, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_model_is_refused(tmp_path):
    """Also where it does not know its checkpoints' fingerprints."""
    soups = {kind: Soup(factory.make_soup(kind, tmp_path / kind)) for kind in ("bert", "t5")}

    def by_layer(soup, change=lambda groups: groups, labels=None):
        names = [name for name in soup.name_map.parameters if soup.tensor_of(name) is not None]
        groups = change(group_parameters(names, "layer"))
        table = torch.tensor(WEIGHTS, dtype=torch.float64).repeat(len(groups), 1)
        return MixingWeights(table, groups, labels or soup.labels)

    bert, t5 = soups["bert"], soups["t5"]
    write(bert, by_layer(bert), tmp_path / "right")
    with pytest.raises(UserError, match="the mixing weights name 'bert"):
        write(t5, by_layer(bert, labels=t5.labels), tmp_path / "out")
    without = by_layer(bert, lambda groups: {g: n for g, n in groups.items() if g != "bert.embeddings"})
    with pytest.raises(UserError, match="no row for the parameter 'bert"):
        write(bert, without, tmp_path / "out")
    strange = MixingWeights(
        mixing.given(WEIGHTS, bert.labels).table, {"model": ()}, bert.labels, {"nope": torch.ones(1)}
    )
    with pytest.raises(UserError, match="the mixing weights name 'nope'"):
        write(bert, strange, tmp_path / "out")
    turned = mixing.given(WEIGHTS, bert.labels[::-1])
    with pytest.raises(UserError, match="in the table's order"):
        write(bert, turned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_training_gives_a_table_that_knows_its_checkpoints(tmp_path):
    import twa_merge as twa

    folders = factory.make_soup("bert", tmp_path)
    weights = twa.merged_model(Soup(folders)).mixing_weights()
    assert weights.fingerprints == Soup(folders).fingerprints
    with pytest.raises(UserError, match="the order differs"):
        write(Soup(folders[::-1]), weights, tmp_path / "out")
