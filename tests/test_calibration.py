"""Calibration block by block: the inputs of all linear layers are those of an ordinary run of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from termwise.algorithms import calibration
from termwise.algorithms.calibration import Calibration
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.models import open_model
from termwise.algorithms.text import read_text, text_of

CONTEXT = 32
COMMON = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "initializer_range": 0.3,
}
GATED: dict[str, Any] = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGURATIONS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=0, initializer_range=0.3
    ),
    "opt": transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16),
    "phi": transformers.PhiConfig(**COMMON, intermediate_size=48),
    "bert": transformers.BertConfig(**COMMON, intermediate_size=48, pad_token_id=1),
    "roberta": transformers.RobertaConfig(
        **(COMMON | {"max_position_embeddings": CONTEXT + 2}), intermediate_size=48, pad_token_id=1, eos_token_id=2
    ),
}
# The layers of one block that read the same tensor, and what stands outside of the blocks
SHARING = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "opt": ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    "phi": ["q_proj k_proj v_proj fc1", "dense", "fc2"],
    "bert": ["query key value", "dense", "dense", "dense"],
}
SHARING |= {"qwen2": SHARING["llama"], "gemma3": SHARING["llama"], "roberta": SHARING["bert"]}
OUTSIDE = {"opt": ["project_in", "project_out lm_head"], "bert": ["pooler.dense"], "roberta": ["pooler.dense"]}
ENCODERS = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel}

ONE_LENGTH = text_of("four windows", ["".join(chr(33 + (7 * place) % 90) for place in range(4 * CONTEXT - 1))])
RAGGED = text_of("ragged", ["a" * 70, "another, shorter one", "short", "x" * 40])


def save_model(folder: Path, name: str) -> Path:
    """A random model of one architecture with a tokenizer of bytes, whose token 0 begins a sequence."""
    torch.manual_seed(5)
    configuration = CONFIGURATIONS[name]
    kind = ENCODERS.get(name, transformers.AutoModelForCausalLM.from_config)
    kind(configuration).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def load_whole(folder: Path) -> Any:
    """The whole model as transformers loads it."""
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def ordinary_inputs(module: Any, names: tuple[str, ...], windows: list[Any]) -> dict[str, NDArray[np.float32]]:
    """The inputs [rows, inputs] of all layers that are called when the model reads ``windows`` of one length."""
    found: dict[str, NDArray[np.float32]] = {}

    def observer(name: str) -> Callable[..., None]:
        return lambda _, arguments: found.update({name: arguments[0].flatten(0, -2).numpy().copy()})

    with torch.inference_mode(), ExitStack() as stack:
        for name in names:
            handle = module.get_submodule(name).register_forward_pre_hook(observer(name))
            stack.callback(handle.remove)
        module(input_ids=torch.from_numpy(np.stack(windows)), use_cache=False)
    return found


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one architecture's model, written once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = save_model(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_input_is_that_of_an_ordinary_run(folder_of: Callable[[str], Path], name: str) -> None:
    model = open_model(folder_of(name))
    run = Calibration(model, ONE_LENGTH, sample_rows=10_000)
    assert {window.size for window in run.windows} == {CONTEXT}
    expected = ordinary_inputs(load_whole(model.location), model.matrix_names, run.windows)
    found = {layer: shared for stage in run.stages() for shared in stage.statistics() for layer in shared.layers}
    assert set(found) == set(expected)
    for layer, inputs in expected.items():
        statistics = found[layer].statistics
        np.testing.assert_array_equal(statistics.sample, inputs, err_msg=layer)
        assert statistics.rows == len(inputs)
        np.testing.assert_array_equal(statistics.max_magnitude, np.abs(inputs).max(axis=0))
        # float64 sums in another order: rows × 2**-53 relative to a sum of positive numbers
        np.testing.assert_allclose(
            statistics.mean_magnitude, np.abs(inputs.astype(np.float64)).mean(axis=0), rtol=1e-12
        )
        assert_gram_is_near(statistics.gram, inputs)


def assert_gram_is_near(gram: NDArray[np.float64], inputs: NDArray[np.float32]) -> None:
    """A float32 sum of n products is off by at most n × 2**-24 (and a little) of the sum of their magnitudes."""
    exact = inputs.astype(np.float64)
    bound = (len(inputs) + 2) * 2.0**-24 * (np.abs(exact).T @ np.abs(exact))
    assert (np.abs(gram - exact.T @ exact) <= bound).all()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layers_that_read_the_same_tensor_share_its_statistics(folder_of: Callable[[str], Path], name: str) -> None:
    model = open_model(folder_of(name))
    stages = [[shared.layers for shared in stage.statistics()] for stage in Calibration(model, RAGGED).stages()]
    blocks = stages[1:-1] if name == "opt" else stages[:-1]
    assert len(blocks) == 3
    for block in blocks:
        assert [" ".join(layer.rpartition(".")[2] for layer in layers) for layers in block] == SHARING[name]
    outside = [stage for stage in stages if stage not in blocks]
    names = [" ".join(layer for layers in stage for layer in layers) for stage in outside]
    expected = OUTSIDE.get(name, ["lm_head"])
    assert [found.replace("model.decoder.", "") for found in names] == expected


def test_windows_of_every_length_count_once_and_nothing_is_padded(folder_of: Callable[[str], Path]) -> None:
    model = open_model(folder_of("llama"))
    run = Calibration(model, RAGGED)
    assert sorted(window.size for window in run.windows) == [6, 7, 9, 21, 32, 32, 32]
    module = load_whole(model.location)
    parts = [ordinary_inputs(module, model.matrix_names, [window]) for window in run.windows]
    for stage in run.stages():
        for shared in stage.statistics():
            inputs = np.concatenate([part[shared.layers[0]] for part in parts])
            assert shared.statistics.rows == run.tokens == len(inputs)
            # A window alone is multiplied in another order than in a batch: a few roundings through three blocks.
            np.testing.assert_allclose(shared.statistics.max_magnitude, np.abs(inputs).max(axis=0), rtol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_the_beginning_of_each_document(folder_of: Callable[[str], Path], name: str) -> None:
    run = Calibration(open_model(folder_of(name)), RAGGED)
    assert [window.size for window in run.windows] == [min(len(text), CONTEXT) for text in RAGGED.documents]


def test_later_stages_see_replaced_weights_or_do_not(folder_of: Callable[[str], Path]) -> None:
    model = open_model(folder_of("gpt2"))
    half = {name: weights.astype(np.float32) / 2 for name, weights in model.matrices() if name != "lm_head"}
    changed, own = load_whole(model.location), load_whole(model.location)
    for name, weights in half.items():
        changed.get_submodule(name).weight.data = torch.from_numpy(np.ascontiguousarray(weights.T))
    for quantized_inputs, module in ((True, changed), (False, own)):
        run = Calibration(model, ONE_LENGTH, sample_rows=10_000, quantized_inputs=quantized_inputs)
        expected = ordinary_inputs(module, model.matrix_names, run.windows)
        for stage in run.stages():
            first = stage.statistics()[0]
            np.testing.assert_array_equal(first.statistics.sample, expected[first.layers[0]])
            for name in stage.layers:
                if name in half:
                    stage.replace(name, half[name])


def test_replaced_weights_before_the_blocks_are_seen_by_the_first_one(folder_of: Callable[[str], Path]) -> None:
    model = open_model(folder_of("opt"))
    changed = load_whole(model.location)
    projection = changed.model.decoder.project_in
    projection.weight.data = projection.weight.data * 2
    run = Calibration(model, ONE_LENGTH, sample_rows=10_000)
    expected = ordinary_inputs(changed, model.matrix_names, run.windows)
    for stage in run.stages():
        for shared in stage.statistics():
            np.testing.assert_array_equal(shared.statistics.sample, expected[shared.layers[0]])
        if stage.name == "before the blocks":
            assert stage.layers == ("model.decoder.project_in",)
            stage.replace(stage.layers[0], projection.weight.data.numpy())


def test_one_block_at_a_time_is_in_memory(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runners: list[Any] = []

    class Spy(calibration._Runner):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            runners.append(self)

    monkeypatch.setattr(calibration, "_Runner", Spy)
    model = open_model(folder_of("llama"))
    seen = []
    for stage in Calibration(model, RAGGED).stages():
        stage.statistics()
        module = runners[0]._module
        real = {name for name, parameter in module.named_parameters() if not parameter.is_meta}
        seen.append({name.split(".")[2] for name in real if name.startswith("model.layers.")})
        assert "lm_head.weight" not in real  # its input is all that is wanted of the head
        assert {name for name in real if "layers" not in name} == {"model.embed_tokens.weight", "model.norm.weight"}
    assert seen == [{"0"}, {"1"}, {"2"}, set()]


def test_a_sample_is_a_bounded_part_of_the_rows_and_follows_the_seed(folder_of: Callable[[str], Path]) -> None:
    model = open_model(folder_of("llama"))

    def first(rows: int, seed: int) -> NDArray[np.float32]:
        run = Calibration(model, RAGGED, sample_rows=rows, seed=seed)
        return next(run.stages()).statistics()[0].statistics.sample

    everything = {row.tobytes() for row in first(10_000, 0)}
    assert len(first(10_000, 0)) == Calibration(model, RAGGED).tokens
    assert len(first(5, 1)) == 5
    assert {row.tobytes() for row in first(5, 1)} <= everything
    np.testing.assert_array_equal(first(5, 1), first(5, 1))
    assert not np.array_equal(first(5, 1), first(5, 2))
    assert first(0, 0).shape == (0, 32)


def test_windows_are_spread_over_the_text(folder_of: Callable[[str], Path]) -> None:
    model = open_model(folder_of("llama"))
    everything = Calibration(model, ONE_LENGTH).windows
    few = Calibration(model, ONE_LENGTH, maximum_windows=2).windows
    np.testing.assert_array_equal(few, [everything[0], everything[-1]])


class TestWhatIsRefused:
    def test_a_text_shorter_than_one_window(self, folder_of: Callable[[str], Path]) -> None:
        with pytest.raises(InputError, match=r"has 6 tokens .* expected at least one window of 32"):
            Calibration(open_model(folder_of("llama")), text_of("short", ["short"]))

    def test_no_windows(self, folder_of: Callable[[str], Path]) -> None:
        with pytest.raises(InputError, match="on 0 windows"):
            Calibration(open_model(folder_of("llama")), RAGGED, maximum_windows=0)

    def test_activations_that_are_not_finite(self, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
        save_model(tmp_path, "llama")
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            TermwiseError, match=r"the input of model.layers.1.mlp.down_proj is NaN or infinite on ragged"
        ):
            for stage in Calibration(open_model(tmp_path), RAGGED).stages():
                stage.statistics()

    def test_a_model_with_a_part_missing(self, tmp_path: Path) -> None:
        save_model(tmp_path, "llama")
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"cannot be run: the checkpoint lacks 1 tensors .* model.norm.weight"):
            Calibration(open_model(tmp_path), RAGGED)

    def test_matrices_without_a_model(self, tmp_path: Path) -> None:
        save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="set of matrices"):
            Calibration(open_model(tmp_path), RAGGED)

    def test_an_encoder_with_a_decoder(self, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
        configuration = transformers.T5Config(vocab_size=257, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        transformers.T5ForConditionalGeneration(configuration).save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((folder_of("llama") / "tokenizer.json").read_bytes())
        with pytest.raises(InputError, match="it has an encoder and a decoder"):
            Calibration(open_model(tmp_path), text_of("long", ["x" * 3000]))

    def test_a_block_that_is_called_again_and_again(self, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
        configuration = transformers.AlbertConfig(
            **COMMON, embedding_size=16, intermediate_size=48, pad_token_id=1, eos_token_id=2
        )
        transformers.AlbertModel(configuration).save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((folder_of("llama") / "tokenizer.json").read_bytes())
        with pytest.raises(InputError, match="expected a chain of blocks"):
            for stage in Calibration(open_model(tmp_path), RAGGED).stages():
                stage.statistics()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["minilm-l6-v2", "tinystories-656k", "stories260k"])
def test_inputs_of_real_models_are_those_of_an_ordinary_run(shared: Path, name: str) -> None:
    model = open_model(shared / "models" / name)
    text = read_text(shared / "text" / "wikitext-2" / "valid.txt")
    text = text_of("part", [text.documents[0][:20_000]])
    run = Calibration(model, text, maximum_windows=1, sample_rows=10_000)
    module = model.load() if name != "minilm-l6-v2" else load_whole(model.location)
    expected = ordinary_inputs(module, model.matrix_names, run.windows)
    for stage in run.stages():
        for found in stage.statistics():
            for layer in found.layers:
                np.testing.assert_array_equal(found.statistics.sample, expected.pop(layer))
    assert not expected
