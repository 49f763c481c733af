"""Self-play from a checkpoint that `transformers` made, and back to one that it loads."""

import json

import numpy as np
import pytest

from jaxconv.data.conversation import Message
from jaxconv.data.template import take_apart

torch = pytest.importorskip("torch", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VIEW = [
    Message("system", "You are Eve. Share three books with Bob."),
    Message("user", "I want two books.", "Bob"),
    Message("assistant", "Then I take one book."),
    Message("user", "Deal.", "Bob"),
    Message("assistant", "I agree, deal."),
]
# The default model has no say here.
CHANGED = {"self_play__iterations": 2, "warm_start__steps": 3, "warm_start__evaluate_every": 3}


def tokenizer(eos="<|im_end|>"):
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([m.content for m in VIEW] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token=eos,
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_checkpoint(folder, family, dtype, eos="<|im_end|>"):
    """A random model of another shape than the config's own, as `transformers` saves it."""
    import transformers

    words = tokenizer(eos)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=320,  # larger than the tokenizer, as checkpoints often are
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=words.eos_token_id,
            tie_word_embeddings=family == "qwen2",
        )
    ).to(dtype)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def check_export(workdir, dtype):
    import transformers

    from jaxconv.models.hf import load_pretrained

    words = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export", dtype="auto")
    assert theirs.dtype == dtype

    ids, own = take_apart(words).render_view(VIEW)
    said = [{"role": m.role, "content": f"{m.name}: " * bool(m.name) + m.content} for m in VIEW]
    rendered = words.apply_chat_template(said, tokenize=True, return_dict=False)
    assert rendered == ids + words.encode("\n")
    spoken = words.decode([token for token, mine in zip(ids, own, strict=True) if mine])
    assert spoken == "Then I take one book.<|im_end|>I agree, deal.<|im_end|>"

    ours, _ = load_pretrained(workdir / "export")
    expected = theirs.float()(torch.tensor([ids])).logits[0].detach().numpy()
    found = np.asarray(ours.logits(ours(np.array([ids]))))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_from_a_bfloat16_checkpoint_to_one(tiny, tmp_path):
    # A base model: its end of text is not the end of a turn.
    start = make_checkpoint(tmp_path / "start", "qwen2", torch.bfloat16, eos="<|endoftext|>")
    workdir = tmp_path / "run"
    done = tiny.run(workdir, model__path=start, **CHANGED)
    assert done.returncode == 0, done.stderr
    check_export(workdir, torch.bfloat16)
    generation = json.loads((workdir / "export" / "generation_config.json").read_text())
    words = tokenizer()
    ends = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == ends
    assert generation["do_sample"] and generation["temperature"] == 1.0
    # What was measured is what was exported: loaded again, it scores the same.
    again = tiny.run(workdir, "--eval_only", model__path=start, **CHANGED)
    assert again.returncode == 0, again.stderr
    results = [
        json.loads((workdir / f"{name}.json").read_text())["results"]
        for name in ("report", "evaluation")
    ]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_from_a_checkpoint_is_exact(dtype, tiny, tmp_path):
    start = make_checkpoint(tmp_path / "start", "llama", dtype)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert tiny.run(whole, model__path=start, **CHANGED).returncode == 0
    tiny.killed("jaxconv.train.ppo:PPO.iterate:1", workdir, model__path=start, **CHANGED)
    tiny.killed("jaxconv.train.ppo:PPO.iterate:2", workdir, model__path=start, **CHANGED)
    assert tiny.run(workdir, model__path=start, **CHANGED).returncode == 0
    check_export(workdir, dtype)
    assert tiny.outcome(workdir) == tiny.outcome(whole)
