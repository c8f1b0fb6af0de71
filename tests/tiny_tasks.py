"""Tiny checkpoints with tokenizers and image processors, made from configs, for the tests of tasks and evaluation."""

import torch

WORDS = [
    *("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad"),
    *("very", "is", "was", "not", "film", "great", "dull", "and", "but", "so"),
]


def save_tokenizer(folder, *, eos=True, pad=True, max_length=64):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos == "added":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    options = {"eos_token": "</s>"} if eos else {}
    options |= {"pad_token": "[PAD]"} if pad else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=max_length, **options
    )
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
    return fast


def save_bert(folder, **options):
    from transformers import BertConfig, BertForSequenceClassification

    save_tokenizer(folder, eos="added")
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    return _save(BertForSequenceClassification, config, folder)


def save_vit(folder, **options):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    half = [0.5] * options.get("num_channels", 3)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=half, image_std=half).save_pretrained(folder)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        **options,
    )  # fmt: skip
    return _save(ViTForImageClassification, config, folder)


def save_gpt2(folder, *, head="GPT2LMHeadModel", eos=True, **options):
    import transformers

    save_tokenizer(folder, eos=eos)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=2, **options
    )
    return _save(getattr(transformers, head), config, folder)


def save_t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    save_tokenizer(folder, eos="added")
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _save(T5ForConditionalGeneration, config, folder)


def _save(cls, config, folder):
    torch.manual_seed(0)
    module = cls(config).eval()
    with torch.no_grad():  # larger than the usual start, so that predictions and losses differ between samples
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return module


def texts(count, seed=0, longest=9):
    """Sentences of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]
