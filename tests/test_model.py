"""MergedModel against the dense float64 oracle, and the traps of wrapping a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests import factory
from tests.reference import DenseTWA
from twa_merge import mixing
from twa_merge.assembly import merged_model
from twa_merge.basis import build_basis, mergeable_parameters
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.groups import group_parameters
from twa_merge.model import MergedModel
from twa_merge.writer import write

TOKENS = torch.arange(2, 26).view(3, 8)
BATCHES = {
    "gpt2": {"input_ids": TOKENS, "labels": TOKENS},
    "llama_tied": {"input_ids": TOKENS, "labels": TOKENS},
    "t5": {"input_ids": TOKENS, "labels": TOKENS},
    "bert": {"input_ids": TOKENS, "labels": torch.tensor([0, 1, 0])},
    "vit": {
        "pixel_values": torch.linspace(-1, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16),
        "labels": torch.tensor([0, 1, 0]),
    },
}


class Wrapped(nn.Module):
    """A transformers model whose forward is its loss, so that the oracle can call it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch).loss


def build(kind, folder, granularity="tensor", coordinates="relative", frozen=()):
    """Return the merged model and its oracle at the same random coefficients."""
    import transformers

    soup = Soup(factory.make_soup(kind, folder, n=4, frozen=frozen))
    cls = getattr(transformers, {**{k: factory._TINY[k][0] for k in factory._TINY}}[kind])
    module = cls.from_pretrained(soup.folder)
    if kind in factory.FUSED:
        module.config._experts_implementation = "eager"  # the only one in float64
    for name, value in vars(module.config).items():
        if "drop" in name and isinstance(value, float):
            setattr(module.config, name, 0.0)
    members = [cls.from_pretrained(source.folder) for source in soup.sources]
    names = list(mergeable_parameters(soup, module))
    groups = group_parameters(names, granularity)
    states = [{f"model.{n}": p.detach() for n, p in m.named_parameters()} for m in members]
    oracle_groups = {g: tuple(f"model.{n}" for n in names) for g, names in groups.items()}
    oracle = DenseTWA(Wrapped(copy.deepcopy(module)).eval(), states, oracle_groups, coordinates)
    model = MergedModel(module, build_basis(soup, module, groups), soup.labels, coordinates=coordinates)
    model.train()
    torch.manual_seed(1)
    values = torch.randn(model.twa_coefficients.shape) * (0.2 if coordinates == "relative" else 0.02)
    with torch.no_grad():
        model.twa_coefficients.copy_(values)
        oracle.coefficients[model._active] = values.double()
    return model, oracle


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def gradients(model, oracle, batch, tolerance=2e-5):
    loss = model(**batch).loss
    loss.backward()
    expected = oracle(**double(batch))
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    compare(model, oracle, tolerance)


def compare(model, oracle, tolerance):
    want = oracle.coefficients.grad[model._active]
    got = model.twa_coefficients.grad.double()
    assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("coordinates", ["relative", "normalized"])
@pytest.mark.parametrize("granularity", ["model", "layer", "tensor", ["*weight"]])
@pytest.mark.parametrize("kind", list(BATCHES))
def test_gradient_is_that_of_the_dense_float64_model(tmp_path, kind, granularity, coordinates):
    model, oracle = build(kind, tmp_path, granularity, coordinates)
    gradients(model, oracle, BATCHES[kind])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_gradient_under_gradient_checkpointing(tmp_path, kind, reentrant):
    model, oracle = build(kind, tmp_path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.module.is_gradient_checkpointing
    gradients(model, oracle, BATCHES[kind])


def test_gradient_of_accumulated_batches(tmp_path):
    model, oracle = build("gpt2", tmp_path)
    for part in TOKENS.split(1):
        (model(input_ids=part, labels=part).loss / 3).backward()
    oracle(**BATCHES["gpt2"]).backward()
    compare(model, oracle, 2e-5)


def test_gradient_under_bf16_autocast(tmp_path):
    """As near to float64 as a plain module's own bf16 gradient, projected."""
    model, oracle = build("gpt2", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        model(**BATCHES["gpt2"]).loss.backward()
    oracle(**double(BATCHES["gpt2"])).backward()
    compare(model, oracle, 0.05)
    plain = copy.deepcopy(model.module)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        plain(**BATCHES["gpt2"]).loss.backward()
    for row, names in enumerate(model.basis.groups.values()):
        expected = sum(model.basis.project(n, plain.get_parameter(n).grad) for n in names)
        torch.testing.assert_close(model.twa_coefficients.grad[row], expected, rtol=0.05, atol=0.02)


def test_a_frozen_group_is_copied_and_left_out(tmp_path):
    model, oracle = build("bert", tmp_path, frozen=["bert.embeddings.*"])
    inactive = [g for g, on in zip(model.basis.groups, model.basis.trainable_G.tolist(), strict=True) if not on]
    assert inactive and all(g.startswith("bert.embeddings") for g in inactive)
    gradients(model, oracle, BATCHES["bert"])
    before = Soup([s.folder for s in model_soup(tmp_path).sources]).read(0, "bert.embeddings.word_embeddings.weight")
    assert torch.equal(model.module.bert.embeddings.word_embeddings.weight, before)


def model_soup(folder):
    return Soup(sorted(folder.glob("member-*")))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimiser_never_trains_on_stale_weights(tmp_path, fused):
    """Fused AdamW does not bump tensor versions; each step's loss must be that of the coefficients before it."""
    model, oracle = build("bert", tmp_path)
    batch = BATCHES["bert"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    for _ in range(4):
        loss = model(**batch).loss
        with torch.no_grad():
            oracle.coefficients[model._active] = model.twa_coefficients.double()
            assert float(loss) == pytest.approx(float(oracle(**batch)), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_rewrite_while_a_graph_is_open_is_an_error(tmp_path):
    model, _ = build("bert", tmp_path)
    loss = model(**BATCHES["bert"]).loss
    with torch.no_grad():
        model.twa_coefficients.add_(0.1)
    model.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_coefficients_are_parameters_and_state(tmp_path):
    model, _ = build("gpt2", tmp_path)
    assert list(model.state_dict()) == ["twa_coefficients"]
    assert [name for name, _ in model.named_parameters()] == ["twa_coefficients"]
    assert not any(p.grad is not None for p in model.module.parameters())
    names = set(model.module.state_dict())
    assert names == set(factory.make_model("gpt2").state_dict())


def test_materialized_puts_any_table_in_place_and_restores_the_coefficients(tmp_path):
    model, _ = build("gpt2", tmp_path)
    soup = model_soup(tmp_path)
    with torch.no_grad():
        own = model(input_ids=TOKENS).logits
        with model.materialized(mixing.one_hot(2, soup.labels)) as module:
            member = type(module).from_pretrained(soup.sources[2].folder)
            torch.testing.assert_close(module(input_ids=TOKENS).logits, member(input_ids=TOKENS).logits)
            assert module.generate(TOKENS[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 10)
        assert torch.equal(model(input_ids=TOKENS).logits, own)


@pytest.mark.parametrize("coordinates", ["relative", "normalized"])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_coefficients_and_mixing_weights_agree(tmp_path, granularity, coordinates):
    soup = Soup(factory.make_soup("bert", tmp_path, n=4))
    start = mixing.given([0.1, 0.2, 0.3, 0.4], soup.labels)
    model = merged_model(soup, granularity=granularity, coordinates=coordinates, start=start)
    weights = model.mixing_weights()
    torch.testing.assert_close(weights.table, start.table.expand_as(weights.table), rtol=0, atol=1e-6)
    assert merged_model(soup).mixing_weights().table.allclose(torch.tensor(0.25, dtype=torch.float64))


def test_dropout_is_off_while_learning_and_back_afterwards(tmp_path):
    soup = Soup(factory.make_soup("bert", tmp_path))
    model = merged_model(soup).train()
    assert model.module.training
    assert torch.equal(model(**BATCHES["bert"]).logits, model(**BATCHES["bert"]).logits)
    module = model.merge_and_unload()
    assert {m.p for m in module.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert module.config.hidden_dropout_prob == 0.1
    assert all(p.requires_grad for p in module.parameters())
    assert all(type(m._parameters) is dict for m in module.modules())


def test_a_merged_module_can_be_saved_copied_and_pickled(tmp_path):
    soup = Soup(factory.make_soup("gpt2", tmp_path))
    model = merged_model(soup)
    model.save_pretrained(tmp_path / "saved")
    again = type(model.module).from_pretrained(tmp_path / "saved")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model.module)))
    for other in (again, twin):
        torch.testing.assert_close(other(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_the_forward_shows_the_signature_of_the_module(tmp_path):
    import inspect

    soup = Soup(factory.make_soup("bert", tmp_path))
    model = merged_model(soup)
    assert "token_type_ids" in inspect.signature(model.forward).parameters
    assert "labels" in inspect.signature(type(model).forward).parameters
    assert isinstance(model, MergedModel)


@pytest.mark.parametrize("kind", factory.FUSED)
def test_experts_that_are_fused_on_load_learn(tmp_path, kind):
    model, oracle = build(kind, tmp_path, granularity="layer")
    gradients(model, oracle, BATCHES["gpt2"], tolerance=1e-3)
    assert any("experts" in name for name in model.basis.blocks)


@pytest.mark.parametrize("storage", ["float32", "int8", "disk"])
@pytest.mark.parametrize("kind", factory.FUSED)
def test_fused_experts_are_put_in_place_as_they_are_written(tmp_path, kind, storage):
    import transformers

    soup = Soup(factory.make_soup(kind, tmp_path / "soup"))
    table = mixing.ema(0.7, soup.labels)
    write(soup, table, tmp_path / "out")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with merged_model(soup, storage=storage).materialized(table) as module:
        for (name, value), wanted in zip(module.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_recurrent_layers_are_refused(tmp_path):
    from safetensors.torch import save_file

    for k in range(2):
        module = nn.LSTM(4, 4)
        save_file(dict(module.state_dict()), tmp_path / f"{k}.safetensors")
    soup = Soup(sorted(tmp_path.glob("*.safetensors")))
    with pytest.raises(UserError, match="LSTM"):
        merged_model(soup, module)


def test_a_training_checkpoint_is_no_member(tmp_path):
    from safetensors.torch import save_file

    folders = factory.make_soup("bert", tmp_path)
    model = merged_model(Soup(folders))
    save_file(model.state_dict(), folders[1] / "model.safetensors")
    with pytest.raises(UserError, match="coefficients of a merge in training"):
        Soup(folders)


def test_aliases_of_a_tie_that_differ_on_disk_are_refused(tmp_path):
    from safetensors.torch import save_file

    folders = factory.make_soup("gpt2", tmp_path)
    for folder in folders:
        state = factory.read_tensors(folder)
        state["lm_head.weight"] = state["transformer.wte.weight"] + 1
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"member-0: '.*' is tied to another tensor"):
        merged_model(Soup(folders))


def test_a_module_that_transformers_does_not_know_keeps_the_names_on_disk(tmp_path):
    import json

    folders = factory.make_soup("tiny_resnet", tmp_path)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"architectures": ["TinyResNet"], "model_type": "tiny"}))
    model = merged_model(Soup(folders), factory.TinyResNet())
    assert "head.weight" in model.mixing_weights().groups


def test_a_model_is_freed_with_its_last_reference(tmp_path):
    """A cycle would keep basis and weights, gigabytes of few objects, until the collector happens to run."""
    import gc
    import weakref

    soup = Soup(factory.make_soup("bert", tmp_path))
    model = merged_model(soup, granularity="layer")
    inputs = torch.arange(8).view(1, 8) % 60
    model(input_ids=inputs).logits.sum().backward()
    with model.materialized():
        pass
    held = [
        weakref.ref(model),
        weakref.ref(model.basis),
        weakref.ref(model.module.bert.embeddings.word_embeddings.weight),
    ]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() is None for ref in held] == [True, True, True]
    finally:
        gc.enable()


def test_a_table_finer_than_the_model_is_put_in_place_row_by_row(tmp_path):
    soup = Soup(factory.make_soup("bert", tmp_path))
    fine = merged_model(soup, granularity="tensor")
    with torch.no_grad():
        fine.twa_coefficients.copy_(0.5 * torch.randn(fine.twa_coefficients.shape))
    table = fine.mixing_weights()
    coarse = merged_model(soup, granularity="model")
    with fine.materialized() as a, coarse.materialized(table) as b:
        for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6, msg=name)
    with pytest.raises(UserError, match=r"differ inside the group"):
        coarse.start_from(table)


def test_saved_configs_keep_their_dropout(tmp_path):
    soup = Soup(factory.make_soup("bert", tmp_path / "soup", hidden_dropout_prob=0.1))
    model = merged_model(soup, granularity="model")
    model.save_pretrained(tmp_path / "saved")
    assert '"hidden_dropout_prob": 0.1' in (tmp_path / "saved/config.json").read_text()
    assert model.module.config.hidden_dropout_prob == 0.0


def test_methods_of_the_module_read_the_present_merge(tmp_path):
    soup = Soup(factory.make_soup("gpt2", tmp_path, scale=0.5))
    model = merged_model(soup)
    ids = torch.tensor([[5, 6, 7]])

    def generated(module):
        return module.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)

    with torch.no_grad():
        model.twa_coefficients[:, 0] += 0.8
    learned = generated(model).logits[0]
    torch.testing.assert_close(learned, model(ids).logits[:, -1])
    with model.materialized(mixing.one_hot(2, soup.labels)):
        pass
    torch.testing.assert_close(generated(model).logits[0], learned)


def test_what_a_model_computes_itself_is_left_alone(tmp_path):
    """Marian's sinusoidal positions are parameters that are never saved."""
    soup = Soup(factory.make_soup("marian", tmp_path))
    model = merged_model(soup)
    positions = model.module.get_parameter("model.encoder.embed_positions.weight").detach().clone()
    assert "model.encoder.embed_positions.weight" not in model.basis.blocks and positions.abs().max() > 0.5
    ids = torch.tensor([[5, 6, 7, 3]])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.twa_coefficients.grad.abs().max() > 0
    module = model.merge_and_unload()
    assert torch.equal(module.get_parameter("model.encoder.embed_positions.weight"), positions)
