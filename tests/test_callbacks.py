"""Snapshots of a real Trainer's run: complete checkpoints, at the right steps, also after a resume, of any model."""

import os
import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

import twa_merge as twa
from tests import factory
from tests.trainers import make_trainer, tokens
from twa_merge.snapshot_stores import DiskStore
from twa_merge.snapshots import SnapshotTaker


class Watch(TrainerCallback):
    """Remembers the weights at every step."""

    def __init__(self, upto=None):
        self.states, self.upto = {}, upto

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        if state.global_step == self.upto:
            raise KeyboardInterrupt


def steps(callback):
    return [int(path.name.partition("-")[2]) for path in callback.snapshots]


def check(callback, watch):
    """Every snapshot is the model of its step."""
    for path, step in zip(callback.snapshots, steps(callback), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, watch.states[step][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"every_n_steps": 5}, [5, 10]),
        ({}, [6, 12]),
        ({"every_n_epochs": 2}, [12]),
        ({"every_n_steps": 3, "last": 2}, [9, 12]),
    ],
)
def test_snapshots_are_checkpoints_of_their_steps(tmp_path, given, expected):
    callback, watch = twa.SnapshotCallback(**given), Watch()
    make_trainer(tmp_path, callbacks=[callback, watch]).train()
    assert steps(callback) == expected
    check(callback, watch)
    if len(expected) > 1:
        assert len(twa.Soup([str(tmp_path / "_snapshots/snapshot-*")])) == len(expected)


def test_checkpoints_of_trainer_are_linked_and_outlive_it(tmp_path):
    callback, watch = twa.SnapshotCallback(every_n_steps=2), Watch()
    settings = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    make_trainer(tmp_path, callbacks=[callback, watch], **settings).train()
    assert steps(callback) == [2, 4, 6, 8, 10, 12]
    check(callback, watch)
    last = tmp_path / "_snapshots/snapshot-12"
    assert os.path.samefile(last / "model.safetensors", tmp_path / "checkpoint-12/model.safetensors")
    assert {path.name for path in last.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_resumed_run_goes_on_with_its_snapshots(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = twa.SnapshotCallback(every_n_steps=3)
    make_trainer(tmp_path / "whole", callbacks=[whole], **settings).train()
    with pytest.raises(KeyboardInterrupt):  # after snapshot 6, on the way from checkpoint 4
        make_trainer(
            tmp_path / "cut", callbacks=[twa.SnapshotCallback(every_n_steps=3), Watch(upto=7)], **settings
        ).train()
    cut = twa.SnapshotCallback(every_n_steps=3)
    make_trainer(tmp_path / "cut", callbacks=[cut], **settings).train(resume_from_checkpoint=True)
    assert steps(cut) == steps(whole) == [3, 6, 9, 12]
    for a, b in zip(whole.snapshots, cut.snapshots, strict=True):
        for name, value in factory.read_tensors(a).items():
            torch.testing.assert_close(factory.read_tensors(b)[name], value, rtol=0, atol=0)


def test_snapshots_of_an_earlier_run_are_not_lost(tmp_path):
    make_trainer(tmp_path, callbacks=[twa.SnapshotCallback(5)]).train()
    with pytest.raises(twa.UserError, match="holds 2 of an earlier run; move them"):
        make_trainer(tmp_path, callbacks=[twa.SnapshotCallback(6)]).train()
    assert DiskStore(tmp_path / "_snapshots").steps == [5, 10]
    again = twa.SnapshotCallback(6, overwrite=True)
    make_trainer(tmp_path, callbacks=[again]).train()
    assert steps(again) == [6, 12]


def test_any_module(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(factory.VOCAB, 8)
            self.out = nn.Linear(8, factory.VOCAB, bias=False)
            self.out.weight = self.embed.weight
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, input_ids, labels):
            self.seen += 1
            logits = self.out(self.embed(input_ids))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    callback, watch = twa.SnapshotCallback(every_n_steps=6), Watch()
    make_trainer(tmp_path, model=Tied(), callbacks=[callback, watch]).train()
    for path, step in zip(callback.snapshots, steps(callback), strict=True):
        state = factory.read_tensors(path)
        assert set(state) == {"embed.weight", "seen"} and state["seen"] == step
        torch.testing.assert_close(state["embed.weight"], watch.states[step]["embed.weight"], rtol=0, atol=0)


def test_adapters_are_merged_into_their_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = factory.make_model("gpt2")
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], r=2, fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    callback = twa.SnapshotCallback(every_n_steps=6)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    make_trainer(tmp_path, model=model, callbacks=[callback]).train()
    for name, p in model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(p, frozen[name], rtol=0, atol=0)
    batch = {"input_ids": tokens(1)[0]["input_ids"].unsqueeze(0)}
    loaded = AutoModelForCausalLM.from_pretrained(callback.snapshots[-1]).eval()
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    assert len(twa.Soup(callback.snapshots)) == 2


def test_a_snapshot_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    writer = SnapshotTaker(DiskStore(tmp_path / "file"))
    writer.take(1, nn.Linear(2, 2))
    with pytest.raises(OSError):
        writer.wait()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"every_n_steps": 0}, "at least 1"),
        ({"last": 0}, "at least 1"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "exclude each other"),
        ({"storage": "int2"}, "expected disk, int8 or int4"),
        ({"storage": "int4", "folder": "here"}, "a folder has no meaning"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(twa.UserError, match=message):
        twa.SnapshotCallback(**given)


@pytest.mark.parametrize("storage, error", [("int8", 0.01), ("int4", 0.15)])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe"])
def test_snapshots_in_memory_are_those_on_disk_but_for_rounding(tmp_path, storage, error, kind):
    disk, held = twa.SnapshotCallback(every_n_steps=3), twa.SnapshotCallback(every_n_steps=3, storage=storage)
    make_trainer(tmp_path, model=factory.make_model(kind), callbacks=[disk, held], max_steps=12).train()
    on_disk, in_memory = disk.soup(), held.soup()
    assert held.store.steps == [3, 6, 9, 12] and held.snapshots == []
    size = sum(p.numel() for p in factory.make_model(kind).parameters())
    assert held.store.held.nbytes < (4 + 3 * (1.5 if storage == "int8" else 1.0)) * size
    name, k = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight", 3
    first, last, rounded = on_disk.read(0, name), on_disk.read(k, name), in_memory.read(k, name)
    assert torch.equal(first, in_memory.read(0, name))
    assert 0 < (rounded - last).norm() / (last - first).norm() < error
    # a merge of them is learned, written and read as of any other
    model = twa.merged_model(in_memory, storage="disk")
    table = twa.ema(0.5, in_memory.labels)
    twa.write(in_memory, table, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with model.materialized(table) as module:
        for (name, p), q in zip(loaded.named_parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_snapshots_in_memory_survive_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}

    def callback():
        return twa.SnapshotCallback(every_n_steps=2, last=4, storage="int8")

    whole = callback()
    make_trainer(tmp_path / "whole", callbacks=[whole], **settings).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", callbacks=[callback(), Watch(upto=7)], **settings).train()
    cut = callback()
    make_trainer(tmp_path / "cut", callbacks=[cut], **settings).train(resume_from_checkpoint=True)
    assert cut.store.steps == whole.store.steps == [6, 8, 10, 12]
    for a, b in zip(whole.soup().tensors, cut.soup().tensors, strict=True):
        for k in range(4):
            assert torch.equal(a.entries[k].values(0, a.entries[k].numel), b.entries[k].values(0, b.entries[k].numel))


def test_one_callback_serves_one_run_after_another(tmp_path):
    disk, held = twa.SnapshotCallback(6), twa.SnapshotCallback(6, storage="int8", overwrite=True)
    for name in ("a", "b"):
        make_trainer(tmp_path / name, callbacks=[disk, held]).train()
        assert disk.snapshots[0].parent == tmp_path / name / "_snapshots"
        assert held.store.steps == [6, 12]
        assert torch.equal(held.soup().read(0, "transformer.wte.weight"), disk.soup().read(0, "transformer.wte.weight"))


def test_a_checkpoint_that_trainer_does_not_save_after_all(tmp_path):
    callback, watch = twa.SnapshotCallback(every_n_steps=4), Watch()
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "metric_for_best_model": "loss"}
    make_trainer(tmp_path, callbacks=[callback, watch], learning_rate=1.0, **settings).train()
    assert steps(callback) == [4, 8, 12]
    check(callback, watch)


LORA = {"r": 2, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6, 7]}}),
        ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6, 7]}}),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ),
    ],
)
def test_adapters_of_every_kind_give_the_model_that_trains(tmp_path, kind, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(factory.make_model(kind), peft.LoraConfig(**LORA, **options))
    callback = twa.SnapshotCallback(every_n_steps=6)
    make_trainer(tmp_path, model=model, callbacks=[callback], learning_rate=3e-2).train()
    batch = {"input_ids": tokens(1)[0]["input_ids"].unsqueeze(0)}
    loaded, info = AutoModelForCausalLM.from_pretrained(callback.snapshots[-1], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-3, atol=1e-4)


def _native(peft):
    model = factory.make_model("gpt2")
    model.add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, **LORA))
    return model


def _prompts(peft):
    return peft.get_peft_model(
        factory.make_model("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )


def _tied(peft):
    return peft.get_peft_model(
        factory.make_model("llama_tied"), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], **LORA)
    )


@pytest.mark.parametrize(
    "make, message", [(_native, "use peft.get_peft_model"), (_prompts, "no weights"), (_tied, "is tied to another")]
)
def test_adapters_that_cannot_be_merged_are_refused_before_training(tmp_path, make, message):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, model=make(peft), callbacks=[twa.SnapshotCallback()])
    with pytest.raises(twa.UserError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


class Fail(TrainerCallback):
    """Ends the first run with an error at step 4."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("storage", ["disk", "int8"])
def test_a_run_that_starts_anew_with_smaller_batches(tmp_path, storage):
    callback = twa.SnapshotCallback(every_n_steps=3, storage=storage)
    fail = Fail(RuntimeError("CUDA out of memory. Tried"))
    trainer = make_trainer(tmp_path, callbacks=[callback, fail], auto_find_batch_size=True)
    trainer.train()
    assert callback.store.steps == list(range(3, trainer.state.global_step + 1, 3))


def test_a_run_is_resumed_while_the_last_snapshot_is_still_written(tmp_path, monkeypatch):
    add = DiskStore.add

    def slow(self, *arguments):
        time.sleep(0.5)
        add(self, *arguments)

    monkeypatch.setattr(DiskStore, "add", slow)
    callback = twa.SnapshotCallback(every_n_steps=3)
    fail = Fail(KeyboardInterrupt())
    trainer = make_trainer(tmp_path, callbacks=[callback, fail], save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert steps(callback) == [3, 6, 9, 12]


def test_two_callbacks_share_a_folder(tmp_path):
    often, seldom = twa.SnapshotCallback(every_n_steps=3), twa.SnapshotCallback(every_n_epochs=1)
    make_trainer(tmp_path, callbacks=[often, seldom]).train()
    assert steps(often) == [3, 6, 9, 12]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tokens(24))


@pytest.mark.parametrize("given, expected", [({"every_n_steps": 3}, [3, 6, 9, 12]), ({"every_n_epochs": 1}, [6, 12])])
def test_a_run_cut_off_between_a_save_and_its_snapshot_keeps_that_one(tmp_path, given, expected):
    callback, settings = twa.SnapshotCallback(**given), {"save_strategy": "steps", "save_steps": 6}
    make_trainer(tmp_path, callbacks=[callback], **settings).train()
    for step in callback.store.steps:
        if step >= 6:
            callback.store.remove(step)
    again = twa.SnapshotCallback(**given)
    make_trainer(tmp_path, callbacks=[again], **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert steps(again) == expected
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "_snapshots/snapshot-6").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").state_dict().items():
        assert torch.equal(kept[name], value)


def test_snapshots_in_memory_may_come_after_the_first_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}

    def callback():
        return twa.SnapshotCallback(every_n_steps=6, storage="int8")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[callback(), Watch(upto=5)], **settings).train()
    again = callback()
    make_trainer(tmp_path, callbacks=[again], **settings).train(resume_from_checkpoint=True)
    assert again.store.steps == [6, 12]


def test_a_model_in_memory_is_of_its_own_class_not_of_the_one_it_was_loaded_from(tmp_path):
    model = factory.make_model("bert")
    model.config.architectures = ["BertForMaskedLM"]
    data = [row | {"labels": row["labels"][0] % 2} for row in tokens()]
    callback = twa.SnapshotCallback(every_n_steps=6, storage="int8")
    make_trainer(tmp_path, model=model, data=data, eval_dataset=data, callbacks=[callback]).train()
    assert type(twa.merged_model(callback.soup()).module) is type(model)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_model_that_processes_share_is_refused_however_it_was_launched(tmp_path, kind, monkeypatch):
    """What `accelerate launch` is told is in the environment, not in the arguments."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(twa.UserError, match="no process has the whole model"):
        twa.SnapshotCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_coefficients_are_no_snapshots(tmp_path):
    members = factory.make_soup("gpt2", tmp_path, n=2)
    args = twa.TWAConfig(str(tmp_path / "out"), use_cpu=True, report_to="none")
    trainer = twa.TWATrainer(members, args, train_dataset=tokens(), callbacks=[twa.SnapshotCallback()])
    with pytest.raises(twa.UserError, match="coefficients of a merge"):
        trainer.train()


@pytest.mark.parametrize(
    "data, every, max_steps, expected",
    [(Stream(), 2, 24, [12, 24]), (Stream(), 3, 24, [18]), (Stream(), 1, 6, [6]), (None, 2, 2, []), (None, 1, 9, [6])],
)
def test_epochs_are_counted_whatever_the_data(tmp_path, data, every, max_steps, expected):
    callback = twa.SnapshotCallback(every_n_epochs=every)
    make_trainer(tmp_path, data=data, callbacks=[callback], max_steps=max_steps).train()
    assert steps(callback) == expected


def test_a_later_run_does_not_change_what_was_kept(tmp_path):
    first = twa.SnapshotCallback(every_n_steps=6)
    make_trainer(tmp_path, callbacks=[first], save_strategy="steps", save_steps=6).train()
    kept = first.snapshots[-1].parent.rename(tmp_path / "kept")
    config = (kept / "snapshot-12/config.json").read_text()
    model = factory.make_model("gpt2", n_layer=1)
    make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=6).train()
    assert (kept / "snapshot-12/config.json").read_text() == config


def test_snapshots_in_memory_that_are_damaged_or_elsewhere(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}

    def make(folder):
        return make_trainer(folder, callbacks=[twa.SnapshotCallback(every_n_steps=3, storage="int8")], **settings)

    make(tmp_path / "a").train()
    with pytest.raises(twa.UserError, match="started in another output_dir"):
        make(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-6"))
    on_disk = make_trainer(tmp_path / "c", callbacks=[twa.SnapshotCallback(every_n_steps=3)], **settings)
    with pytest.warns(UserWarning, match="none in .* from before step 6"):
        on_disk.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-6"))
    file = tmp_path / "a/checkpoint-12/snapshots.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(twa.UserError, match="damaged"):
        make(tmp_path / "a").train(resume_from_checkpoint=True)


def test_the_weights_that_a_run_goes_on_with_are_kept_whatever_its_own_folder_holds(tmp_path):
    """A run resumed from elsewhere, into a folder where another run has left a checkpoint of the same step."""
    settings = {"save_strategy": "steps", "save_steps": 6}
    make_trainer(tmp_path / "a", **settings).train()
    make_trainer(tmp_path / "b", model=factory.make_model("gpt2", seed=7), **settings).train()
    callback = twa.SnapshotCallback(every_n_steps=3)
    trainer = make_trainer(tmp_path / "b", callbacks=[callback], **settings)
    with pytest.warns(UserWarning, match="none in"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-6"))
    assert steps(callback) == [6, 9, 12]
    kept = AutoModelForCausalLM.from_pretrained(callback.snapshots[0]).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "a/checkpoint-6").state_dict().items():
        assert torch.equal(kept[name], value)


def test_a_stream_that_goes_on_in_the_middle_of_an_epoch(tmp_path):
    settings = {"data": Stream(), "save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    callback = twa.SnapshotCallback(every_n_epochs=1)
    make_trainer(tmp_path, callbacks=[callback], **settings).train()
    assert steps(callback) == [6, 12]
    again = twa.SnapshotCallback(every_n_epochs=1)
    make_trainer(tmp_path, callbacks=[again], **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps(again) == [6, 12]


def test_a_callback_in_memory_serves_a_second_run_that_is_cut_off_before_its_first(tmp_path):
    callback = twa.SnapshotCallback(every_n_steps=6, storage="int8", overwrite=True)
    make_trainer(tmp_path / "a", callbacks=[callback]).train()
    settings = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "b", callbacks=[callback, Watch(upto=5)], **settings).train()
    again = twa.SnapshotCallback(every_n_steps=6, storage="int8")
    make_trainer(tmp_path / "b", callbacks=[again], **settings).train(resume_from_checkpoint=True)
    assert again.store.steps == [6, 12]


class Moves(TrainerCallback):
    """Changes the working directory in the middle of a run."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.folder = monkeypatch, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            self.monkeypatch.chdir(self.folder)


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callback = twa.SnapshotCallback(every_n_steps=3)
    trainer = make_trainer("run", callbacks=[callback, Moves(monkeypatch, tmp_path / "elsewhere")])
    trainer.train()
    assert steps(callback) == [3, 6, 9, 12]
    assert twa.finish(trainer, steps=2).weights.num_checkpoints == 4
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_model_in_parts_is_refused(tmp_path):
    """Tensor parallelism asks for nothing in the arguments or the environment."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(distribute_tensor(module.weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
        trainer = make_trainer(tmp_path / "run")
        with pytest.raises(twa.UserError, match="no process has the whole model"):
            twa.SnapshotCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=module)
    finally:
        torch.distributed.destroy_process_group()


def test_an_untied_head_is_untied_after_a_resume_too(tmp_path):
    """The head alone is trained, while the config says that it is the embedding."""
    peft = pytest.importorskip("peft")
    settings = {"save_strategy": "steps", "save_steps": 6}
    tables = []
    for resumed in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], r=2, fan_in_fan_out=True)
        model = peft.get_peft_model(factory.make_model("gpt2"), config)
        callback = twa.SnapshotCallback(every_n_steps=3, storage="int8")
        trainer = make_trainer(tmp_path, model=model, callbacks=[callback], **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resumed else None)
        tables.append(twa.finish(trainer, steps=2, granularity="layer").league[-1].weights.table)
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-4)
