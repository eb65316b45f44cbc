"""Sentence vectors follow all files of a sentence-transformers folder, or the folder is refused by name.

Right answers are computed by hand, and where sentence-transformers is installed also by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_folders import TEXTS, hidden_states, make_folder, make_model, make_tokenizer
from torch import Tensor

from bertstream import BertEmbedding, ConfigError, Encoder, EncoderError
from bertstream.encoding.sentence_folder import read_sentence_folder
from bertstream.tokens import Text

QUERY = {"prompts": {"query": "query : ", "doc": "find : ", "STS 22": "a "}, "default_prompt_name": "query"}


def load(folder: str | Path, **options: Any) -> Encoder:
    return Encoder.from_pretrained(folder, **{"output": "sentence", "dtype": "float32", "device": "cpu"} | options)


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


# Pooling.

POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(0).values,
    "mean_tokens": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / math.sqrt(len(states)),
    "weightedmean_tokens": lambda states: (
        sum(states[i] * (i + 1) for i in range(len(states))) / sum(range(1, len(states) + 1))
    ),  # type: ignore[return-value]
    "lasttoken": lambda states: states[-1],
}
NEW_NAMES = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}


def test_each_pooling_is_followed_in_its_old_and_its_new_spelling(tmp_path: Path) -> None:
    """Flags have an order of their own, a list says its order."""
    flags = make_folder(tmp_path / "flags", {f"pooling_mode_{mode}": True for mode in reversed(POOLED)})
    modes = ["lasttoken", "weightedmean", "mean_sqrt_len_tokens", "cls", "mean", "max"]
    listed = make_folder(tmp_path / "listed", {"pooling_mode": modes})
    pooled = {mode: torch.stack([pool(hidden_states(flags, text)) for text in TEXTS]) for mode, pool in POOLED.items()}
    close(load(flags)(TEXTS).vectors, torch.cat(list(pooled.values()), -1))
    old = {new: name for name, new in NEW_NAMES.items()}
    close(load(listed)(TEXTS).vectors, torch.cat([pooled[old.get(mode, mode)] for mode in modes], -1))
    one = make_folder(tmp_path / "one", {"pooling_mode": "lasttoken"})
    close(load(one)(TEXTS).vectors, pooled["lasttoken"])


def test_a_pooling_that_names_nothing_is_the_mean(tmp_path: Path) -> None:
    """As in sentence-transformers 6."""
    for name, config in (("none", {"x": 1}), ("off", {"pooling_mode_cls_token": False})):
        assert load(make_folder(tmp_path / name, config)).pooling == ("mean",)


def test_special_tokens_may_be_left_out_of_the_new_poolings(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    states = hidden_states(folder, TEXTS[0])
    for pooling, mode in (("last", "lasttoken"), ("mean_sqrt_len", "mean_sqrt_len_tokens")):
        found = load(folder, pooling=pooling, special_tokens=False)([TEXTS[0]]).vectors[0]
        close(found, POOLED[mode](states[1:-1]))


def test_the_last_token_of_a_text_in_windows_is_the_texts_last() -> None:
    encoder = Encoder(
        make_model(), make_tokenizer(), output="sentence", pooling="last", overflow="windows", max_length=8
    )
    text = "bank " * 4 + "river " * 5
    alone = Encoder(make_model(), make_tokenizer(), output="sentence", pooling="last")
    close(encoder([text]).vectors, alone(["bank river river river river river"]).vectors)


# Prompts.


def test_the_default_prompt_is_put_before_each_text_unless_another_is_chosen(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, about=QUERY)
    prompts = {None: "query : ", "query": "query : ", "doc": "find : ", "STS 22": "a ", "the ": "the ", "": ""}
    for prompt, text in prompts.items():
        right = torch.stack([hidden_states(folder, text + one).mean(0) for one in TEXTS])
        close(load(folder, prompt=prompt)(TEXTS).vectors, right)
    assert load(folder, pooling="cls", layers=1).tokenizer.prompt == "query : ", "whatever is made of the tokens"


def test_without_a_default_a_prompt_is_put_before_texts_only_if_it_is_asked_for(tmp_path: Path) -> None:
    for number, name in enumerate((None, "document")):  # a name that sentence-transformers has without any text
        folder = make_folder(tmp_path / str(number), about=QUERY | {"default_prompt_name": name})
        assert load(folder).tokenizer.prompt == ""
        assert load(folder, prompt="doc").tokenizer.prompt == "find : "


def test_a_prompt_that_looks_like_a_name_and_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt='qurey': the folder's prompts are \['STS 22', 'doc', 'query'\]"):
        load(make_folder(tmp_path / "named", about=QUERY), prompt="qurey")
    with pytest.raises(ConfigError, match="prompt='query': the folder names no prompts; .* 'query: '"):
        load(make_folder(tmp_path / "plain"), prompt="query")


def test_a_default_prompt_that_the_folder_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"default_prompt_name='passage' is none of its prompts"):
        load(make_folder(tmp_path, about=QUERY | {"default_prompt_name": "passage"}))


@pytest.mark.parametrize("output", ["tokens", "words"])
def test_a_prompt_is_for_sentences_only(output: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, about=QUERY, settings={"max_seq_length": 4, "do_lower_case": True})
    encoder = load(folder, output=output)
    assert encoder.tokenizer.prompt == "" and encoder.tokenizer.max_length == 40
    assert encoder.tokenizer(["The"])[0].input_ids.tolist() == [2, 6, 3], "plain transformers"
    for call in (lambda: load(folder, output=output, prompt="doc"), lambda: own(output=output, prompt="a ")):
        with pytest.raises(ConfigError, match=f"prompt='.*' has no effect on output='{output}'"):
            call()


def own(**options: Any) -> Encoder:
    return Encoder(make_model(), make_tokenizer(), **options)


def test_a_prompt_for_a_model_of_ones_own() -> None:
    found = own(output="sentence", prompt="query : ")(["the bank"]).vectors
    assert torch.equal(found, own(output="sentence")(["query : the bank"]).vectors)
    with pytest.raises(ConfigError, match="prompt=3: pass a string"):
        own(output="sentence", prompt=3)


def test_a_prompt_comes_before_the_first_of_a_pair_and_before_lists_of_words() -> None:
    tokenizer = own(output="sentence", prompt="query : ").tokenizer
    texts: list[Text] = [("the", "bank"), ["the", "bank"], (["the"], ["bank"])]
    pair, words, both = tokenizer(texts)
    assert pair.input_ids.tolist() == both.input_ids.tolist() == [2, 11, 12, 5, 3, 7, 3]
    assert words.input_ids.tolist() == [2, 11, 12, 5, 7, 3]
    assert words.word_ids is not None and words.word_ids.tolist() == [-1, -1, -1, 0, 1, -1] and words.num_words == 2
    assert both.word_ids is not None and both.word_ids.tolist() == [-1, -1, -1, 0, -1, 1, -1] and both.num_words == 2


def test_a_prompt_may_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    """The prompt's tokens are seen by the others; a token's weight is that of its place in the whole."""
    flags = {f"pooling_mode_{mode}": True for mode in POOLED}
    folder = make_folder(tmp_path, flags | {"include_prompt": False}, about=QUERY)
    found = load(folder)(TEXTS).vectors.view(len(TEXTS), len(POOLED), -1)
    for text, vectors in zip(TEXTS, found, strict=True):
        states = hidden_states(folder, "query : " + text)
        for (mode, pool), vector in zip(POOLED.items(), vectors, strict=True):
            if mode == "weightedmean_tokens":
                weights = torch.arange(4.0, len(states) + 1)[:, None]
                close(vector, (states[3:] * weights).sum(0) / weights.sum())
            else:
                close(vector, pool(states[3:]))
    states = hidden_states(folder, TEXTS[0])
    close(load(folder, prompt="")([TEXTS[0]]).vectors[0], torch.cat([pool(states) for pool in POOLED.values()]))


def test_a_prompt_that_does_not_count_has_no_share_in_windows_either(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"pooling_mode": "mean", "include_prompt": False}, about=QUERY)
    batch = load(folder, overflow="windows", max_length=8).tokenizer.batch(["bank " * 12, "the"])
    assert batch.owned is not None and batch.owned.sum() == 12 + 1 + 1 + 1, "the words, and each text's last token"
    assert not batch.owned[:3].any()


def test_prompts_are_part_of_a_tokenizers_identity(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"pooling_mode": "mean", "include_prompt": False}, about=QUERY)
    chosen = [{}, {"prompt": ""}, {"prompt": "doc"}, {"pooling": "mean"}]
    assert len({load(folder, **options).tokenizer.identity for options in chosen}) == 4


# How texts become tokens.


def test_the_longest_text_is_the_folders_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, settings={"max_seq_length": 5})
    text = "the bank of the river"
    cut = hidden_states(folder, text, truncation=True, max_length=5).mean(0)
    close(load(folder, overflow="truncate")([text]).vectors[0], cut)
    with pytest.raises(EncoderError, match=r"has 7 tokens, the folder's max_seq_length is 5 \(max_length= chooses"):
        load(folder)([text])
    close(load(folder, max_length=40)([text]).vectors[0], hidden_states(folder, text).mean(0))
    assert load(folder, max_length=4, overflow="truncate").tokenizer.max_length == 4
    wider = make_folder(tmp_path / "wider", settings={"max_seq_length": 512})
    assert load(wider).tokenizer.max_length == 40, "no more than the model takes"


def test_each_limit_is_named_by_its_owner() -> None:
    text: list[Text] = ["bank " * 13]
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 14
    for encoder, said in (
        (Encoder(make_model(), tokenizer), "15 tokens, the tokenizer's model_max_length is 14"),
        (Encoder(make_model(max_position_embeddings=12), tokenizer), "15 tokens, the model takes 12"),
        (Encoder(make_model(), tokenizer, max_length=8), "15 tokens, max_length is 8"),
    ):
        with pytest.raises(EncoderError, match=said):
            encoder(text)
        with pytest.raises(EncoderError, match=said):
            encoder.encode(own().tokenizer.batch(text))
    assert len(Encoder(make_model(), tokenizer, max_length=15)(text)) == 1, "the tokenizer's limit is advice"
    with pytest.raises(ConfigError, match="max_length=41: the model takes 1 to 40 tokens"):
        Encoder(make_model(), tokenizer, max_length=41)


def test_texts_are_lowercased_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, settings={"max_seq_length": 40, "do_lower_case": True})
    close(load(folder)(["The Bank"]).vectors[0], hidden_states(folder, "the bank").mean(0))
    plain = make_folder(tmp_path / "plain", settings={"do_lower_case": False})
    close(load(plain)(["The Bank"]).vectors[0], hidden_states(folder, "The Bank").mean(0))


@pytest.mark.parametrize("output", ["sentence", "tokens"])
def test_the_transformer_may_be_in_a_folder_of_its_own(output: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, transformer="0_Transformer", settings={"max_seq_length": 6}, about=QUERY)
    states = hidden_states(f"{folder}/0_Transformer", "query : the bank")
    if output == "sentence":
        encoder = load(folder)
        close(encoder(["the bank"]).vectors[0], states.mean(0))
        assert encoder.tokenizer.max_length == 6
    else:
        close(load(folder, output=output)(["query : the bank"]).values, states)
    assert load(folder, subfolder="0_Transformer", output="tokens")(["the"]).lengths.tolist() == [3]


def test_settings_in_a_file_of_an_early_name_are_followed(tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path))
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 7}))
    assert load(folder).tokenizer.max_length == 7


# Modules after the pooling.

WEIGHTS = {"linear.weight": torch.arange(24.0).view(3, 8).cos(), "linear.bias": torch.tensor([0.5, -0.2, 0.1])}
DENSE = {"in_features": 8, "out_features": 3, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def test_a_dense_layer_and_a_normalisation_after_it_are_followed(tmp_path: Path) -> None:
    after = [("Dense", DENSE), ("Dropout", {"dropout": 0.5}), ("Normalize", None)]
    encoder = load(make_folder(tmp_path, after=after, weights=WEIGHTS))
    right = []
    for text in TEXTS:
        vector = torch.tanh(
            WEIGHTS["linear.weight"] @ hidden_states(str(tmp_path), text).mean(0) + WEIGHTS["linear.bias"]
        )
        right.append(vector / vector.norm())
    close(encoder(TEXTS).vectors, torch.stack(right))
    assert encoder.embedding_dim == 3 and encoder.row_shape == (3,) and encoder.normalize
    assert load(tmp_path, pooling="mean").embedding_dim == 8, "a pooling of one's own leaves the folder's modules out"
    assert load(tmp_path, layers=1).embedding_dim == 8
    assert load(tmp_path, output="tokens").embedding_dim == 8


def test_a_normalisation_between_dense_layers_a_residual_and_other_activations_are_followed(tmp_path: Path) -> None:
    first = {"in_features": 8, "out_features": 8, "bias": False, "use_residual": True}
    first["activation_function"] = "torch.nn.modules.activation.ReLU"
    second = DENSE | {"activation_function": "torch.nn.modules.linear.Identity", "use_residual": True}
    folder = make_folder(tmp_path, after=[("Dense", first), ("Normalize", None), ("Dense", second)])
    square, residual = torch.arange(64.0).view(8, 8).sin(), torch.ones(3, 8) / 8
    torch.save({"linear.weight": square}, tmp_path / "2_Dense" / "pytorch_model.bin")
    torch.save(WEIGHTS | {"residual.weight": residual}, tmp_path / "4_Dense" / "pytorch_model.bin")
    encoder = load(folder)
    vector = hidden_states(folder, TEXTS[0]).mean(0)
    vector = vector + torch.relu(square @ vector)
    vector = vector / vector.norm()
    right = WEIGHTS["linear.weight"] @ vector + WEIGHTS["linear.bias"] + residual @ vector
    close(encoder([TEXTS[0]]).vectors[0], right)
    assert not encoder.normalize


def test_dense_layers_are_trained_moved_split_and_hashed_with_the_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, after=[("Dense", DENSE)], weights=WEIGHTS)
    encoder = load(folder)
    head = encoder.model.sentence_head
    assert load(folder, dtype="bfloat16")(TEXTS).vectors.shape == (5, 3)
    _, upper = encoder.split(at=1)
    lower = encoder.split(at=1)[0]
    close(upper(lower(TEXTS)).vectors, encoder(TEXTS).vectors)
    assert not any(name.startswith("model.sentence_head") for name, _ in lower.named_parameters())
    encoder.freeze()
    before = encoder.fingerprint()
    assert before not in (None, load(folder, pooling="mean").fingerprint())
    with torch.no_grad():
        head[0].linear.bias.add_(1)
    assert encoder.fingerprint() != before
    other = make_folder(
        tmp_path / "relu", after=[("Dense", DENSE | {"activation_function": "torch.nn.ReLU"})], weights=WEIGHTS
    )
    assert load(other).fingerprint() != before
    encoder.unfreeze(1)
    assert all(parameter.requires_grad for parameter in head.parameters())
    BertEmbedding(encoder)(["a bank"]).values.sum().backward()
    assert head[0].linear.weight.grad is not None


def test_a_text_without_any_token_is_a_row_of_zeros_after_a_dense_layer_too(tmp_path: Path) -> None:
    encoder = load(make_folder(tmp_path, after=[("Dense", DENSE)], weights=WEIGHTS))
    batch = encoder.tokenizer.batch(["the", "bank"])
    batch.input_ids, batch.cu_seqlens, batch.special = batch.input_ids[:3], batch.cu_seqlens.copy(), None
    batch.cu_seqlens[:] = [0, 3, 3]
    vectors = encoder.encode(batch).vectors
    assert vectors[0].any() and not vectors[1].any()


def test_a_dense_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"pooling_mode": ["cls", "mean"]}, after=[("Dense", DENSE)], weights=WEIGHTS)
    with pytest.raises(ConfigError, match="makes vectors of 16 numbers, and the model's Dense takes 8"):
        load(folder)
    wrong = make_folder(tmp_path / "wrong", after=[("Dense", DENSE | {"out_features": 4})], weights=WEIGHTS)
    with pytest.raises(EncoderError, match="weights in 2_Dense are not those of its config.json"):
        load(wrong)
    none = make_folder(tmp_path / "none", after=[("Dense", DENSE)])
    with pytest.raises(EncoderError, match="2_Dense holds neither model.safetensors nor pytorch_model.bin"):
        load(none)


# Refusals.


@pytest.mark.parametrize(
    ("pooling", "after", "said"),
    [
        ({"pooling_mode": "median"}, [], "pooling median"),
        ({"pooling_mode_attention": True}, [], "pooling attention"),
        (None, [("LSTM", {})], "module LSTM"),
        (None, [("custom_st.Transformer", None)], "module custom_st.Transformer"),
        (None, [("Dense", DENSE | {"activation_function": "mine.Swish"})], "activation_function='mine.Swish'"),
        (
            None,
            [("Dense", DENSE | {"activation_function": "torch.nn.Linear"})],
            "activation_function='torch.nn.Linear'",
        ),
        (None, [("Dense", DENSE | {"module_input_name": "token_embeddings"})], "module_input_name='token_embeddings'"),
    ],
)
def test_modules_that_are_not_known_are_refused_until_the_user_chooses_a_pooling(
    pooling: Any, after: Any, said: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, pooling, after=after)
    with pytest.raises(
        EncoderError, match=rf"in a way that is not known here \(.*{said}.*\): choose one with pooling="
    ):
        load(folder)
    assert load(folder, pooling="mean").embedding_dim == 8
    assert load(folder, output="words").embedding_dim == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task='fill-mask'"),
        ({"modality_config": {"message": {"method": "forward", "method_output_name": "x"}}}, "modality_config="),
        ({"module_output_name": "scores"}, "module_output_name='scores'"),
        ({"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs="),
        ({"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args: truncation_side='left'"),
        ({"model_kwargs": {"num_hidden_layers": 1}}, "model_kwargs: num_hidden_layers=1"),
        ({"tokenizer_name_or_path": "elsewhere"}, "tokenizer_name_or_path='elsewhere'"),
    ],
)
def test_settings_that_are_not_known_are_refused(settings: Any, said: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, settings=settings)
    for options in ({}, {"pooling": "mean"}):
        with pytest.raises(EncoderError, match=rf"settings that are not known here \({said}"):
            load(folder, **options)
    assert load(folder, output="tokens").embedding_dim == 8


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", {"a": 1}),
        ("modules.json", ["Transformer"]),
        ("modules.json", [{"path": ""}]),
        ("1_Pooling/config.json", [1]),
        ("sentence_bert_config.json", "text"),
        ("config_sentence_transformers.json", [1]),
        ("config_sentence_transformers.json", {"prompts": ["query"]}),
        ("config_sentence_transformers.json", {"prompts": {"query": 7}}),
        ("sentence_bert_config.json", {"max_seq_length": "long"}),
        ("sentence_bert_config.json", {"max_seq_length": 0}),
    ],
)
def test_a_file_that_holds_something_else_is_named(file: str, content: Any, tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path))
    (folder / file).write_text(json.dumps(content))
    name = "max_seq_length" if isinstance(content, dict) and "max_seq_length" in content else file
    with pytest.raises(EncoderError, match=rf"{name}.* must be "):
        load(folder)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path))
    (folder / "modules.json").write_text("[{")
    with pytest.raises(EncoderError, match="modules.json is not JSON"):
        load(folder)


def test_settings_that_change_no_vector_are_not_refused(tmp_path: Path) -> None:
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": True,
        "query_length": 8,
        "processing_kwargs": {"chat_template": {"x": 1}},
        "model_args": {"attn_implementation": "eager", "torch_dtype": "float16"},
        "tokenizer_args": {"padding_side": "left"},
        "config_args": {},
        "tokenizer_name_or_path": None,
    }
    assert load(make_folder(tmp_path, settings=settings)).pooling == ("mean",)


def test_a_folder_that_begins_with_other_modules_is_refused() -> None:
    for kinds, said in ((["StaticEmbedding", "Pooling"], "first"), (["Transformer", "Normalize"], "second")):
        listed = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
        found = read_sentence_folder(lambda file, listed=listed: listed if file == "modules.json" else None)
        assert found is not None and f"its {said} module is no" in found.unknown_modules[0]
    assert read_sentence_folder(lambda file: None) is None


# Saving.


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken"])
def test_a_followed_folder_is_saved_and_read_again(pooling: str, tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "from",
        {"pooling_mode": pooling, "include_prompt": False},
        after=[("Dense", DENSE), ("Normalize", None)],
        settings={"max_seq_length": 9, "do_lower_case": True},
        about=QUERY,
        weights=WEIGHTS,
    )
    encoder = load(folder, prompt="doc", overflow="truncate")
    right = encoder(TEXTS).vectors
    encoder.save_pretrained(tmp_path / "to")
    again = load(tmp_path / "to", overflow="truncate")
    assert again(TEXTS).vectors.equal(right) and again.tokenizer.max_length == 9 and again.tokenizer.prompt == "find : "
    assert load(tmp_path / "to", prompt="query").tokenizer.prompt == "query : "
    assert again.fingerprint() == encoder.fingerprint()
    assert hasattr(encoder.model, "sentence_head"), "saving leaves the encoder as it is"
    load(folder, output="tokens").save_pretrained(tmp_path / "to")
    assert load(tmp_path / "to").pooling == ("mean",) and load(tmp_path / "to").tokenizer.prompt == ""


def test_an_encoders_own_prompt_is_saved_as_the_default(tmp_path: Path) -> None:
    encoder = own(output="sentence", prompt="find : ", pooling="last")
    encoder.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.tokenizer.prompt == "find : " and again.pooling == ("last",)
    close(again(TEXTS).vectors, encoder(TEXTS).vectors)


# sentence-transformers itself.

CASES: dict[str, dict[str, Any]] = {
    "several": {"pooling": {"pooling_mode": ["lasttoken", "cls", "mean_sqrt_len_tokens"]}},
    "flags": {"pooling": {f"pooling_mode_{mode}": True for mode in POOLED}},
    "default prompt": {"about": QUERY},
    "prompt that does not count": {
        "pooling": {f"pooling_mode_{mode}": True for mode in POOLED} | {"include_prompt": False},
        "about": QUERY,
    },
    "lowercased": {"settings": {"max_seq_length": 40, "do_lower_case": True}, "about": QUERY},
    "cut": {"settings": {"max_seq_length": 5}},
    "cut prompt": {
        "settings": {"max_seq_length": 6},
        "about": QUERY,
        "pooling": {"pooling_mode": "mean", "include_prompt": False},
    },
    "dense": {"after": [("Dense", DENSE), ("Normalize", None)], "weights": WEIGHTS},
    "normalised": {"after": [("Normalize", None)]},
    "early": {"transformer": "0_Transformer", "settings": {"max_seq_length": 7, "do_lower_case": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_sentence_transformers_for_early_folders_and_its_own(case: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer
    folder = make_folder(tmp_path / "early", **CASES[case])
    reference = theirs(folder, device="cpu")
    reference.save(str(tmp_path / "now"))
    right = torch.from_numpy(reference.encode(TEXTS))
    for path in (folder, tmp_path / "now"):
        found = load(path, overflow="truncate")
        close(found(TEXTS).vectors, right)
    found.save_pretrained(tmp_path / "saved")
    if case != "several":  # which flags cannot name
        close(torch.from_numpy(theirs(str(tmp_path / "saved"), device="cpu").encode(TEXTS)), right)


def test_truncation_on_the_left_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer
    folder = make_folder(tmp_path, settings={"max_seq_length": 5})
    make_tokenizer(truncation_side="left").save_pretrained(folder)
    right = torch.from_numpy(theirs(folder, device="cpu").encode(TEXTS))
    close(load(folder, overflow="truncate")(TEXTS).vectors, right)
