"""The sweep of settings: some of its cases, that it draws all settings, and that it sees what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sweep_settings
import torch
from sweeps.cases import MODELS, SENTENCE_POOLINGS, WORD_POOLINGS, Case, draw
from sweeps.expected import Setting
from sweeps.reference import Tokens, units, windows
from sweeps.tokenizers import TOKENIZERS

from bertstream import Encoder

CASES = 30
SEED = 17
EVERY = list(TOKENIZERS)


def cases(count: int, seed: int = SEED) -> list[Case]:
    return [draw(number, seed, MODELS, EVERY) for number in range(count)]


def test_random_settings_are_right_or_refused() -> None:
    verdicts: Counter[str] = Counter()
    wrong = []
    for number in range(CASES):
        case = draw(number, SEED, MODELS, EVERY)
        verdict, said = sweep_settings.judge(case)
        verdicts[verdict] += 1
        if verdict == "wrong":
            wrong.append(f"--seed {SEED} --case {case.number}: {said}")
    assert wrong == []
    assert verdicts["right"] > CASES // 2


def test_a_case_is_a_function_of_its_number_and_the_seed() -> None:
    assert str(cases(20)) == str(cases(20)) != str(cases(20, seed=1))


def test_every_setting_is_drawn() -> None:
    drawn = cases(400)
    for name in ("output", "combine", "overflow", "dtype", "packed", "special_tokens", "normalize", "stride", "prompt"):
        assert len({case.options.get(name) for case in drawn}) >= 2, name
    named = [case.options.get("pooling") or () for case in drawn]
    poolings = {how for names in named for how in ((names,) if isinstance(names, str) else names)}
    assert poolings == {*WORD_POOLINGS, *SENTENCE_POOLINGS, "pooler"}
    assert {case.truncation_side for case in drawn} == {"left", "right"}
    assert {case.way for case in drawn} == {"call", "wrap", "stream", "cache"}
    assert {case.model for case in drawn} == {*MODELS} and {case.tokenizer for case in drawn} == {*EVERY}
    kinds = {type(text[0] if isinstance(text, tuple) else text) for case in drawn for text in case.texts}
    assert kinds == {str, list} and any(isinstance(text, tuple) for case in drawn for text in case.texts)
    assert any(text in ("", []) for case in drawn for text in case.texts)


def shifted(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[1:], values[:1]]) if len(values) > 1 else values + 1


def scaled(values: torch.Tensor) -> torch.Tensor:
    return values * 1.2


def not_finite(values: torch.Tensor) -> torch.Tensor:
    return values.log()


@pytest.mark.parametrize("mistake", [shifted, scaled, not_finite])
def test_the_sweep_sees_a_mistake(
    mistake: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = Encoder.embed

    def mistaken(self: Any, *arguments: Any, **options: Any) -> Any:
        found = embed(self, *arguments, **options)
        found.values = mistake(found.values)
        return found

    monkeypatch.setattr(Encoder, "embed", mistaken)
    verdicts = [sweep_settings.judge(case) for case in cases(16)]
    assert not [said for verdict, said in verdicts if verdict == "right"]
    assert [said for verdict, said in verdicts if verdict == "wrong" and "relative error" in said]


def test_a_refusal_without_a_reason_and_vectors_without_an_answer_are_wrong() -> None:
    (case,) = (case for case in cases(40) if case.number == 3)
    case.options |= {"output": "tokens", "layers": -1, "overflow": "error", "max_length": None, "packed": None}
    case.options = {name: case.options[name] for name in ("output", "layers", "combine", "overflow", "max_length")}
    case.options |= {"special_tokens": True, "dtype": "float32", "combine": "concat"}
    case.must_refuse, case.layers, case.texts, case.way = "", (-1,), ["a bank"], "call"
    assert sweep_settings.judge(case)[0] == "right"
    case.must_refuse = "nobody knows why"
    assert sweep_settings.judge(case) == ("wrong", "vectors where there is no right answer: nobody knows why")
    case.must_refuse = ""
    case.options["layers"] = 99
    verdict, said = sweep_settings.judge(case)
    assert verdict == "wrong" and said.startswith("refused without a reason: ConfigError")


def test_the_reference_follows_the_rule_of_windows_in_a_case_worked_out_by_hand() -> None:
    # [CLS] 0 1 2 3 4 5 6 [SEP] in windows of 6, which have room for 4 tokens and overlap by 2: 0-3, 2-5, 3-6.
    text = Tokens([90, *range(7), 91], None, [None, *[0] * 7, None], [], [True] * 9, 0)
    found = windows(text, 6, 2)
    assert [window.ids for window in found] == [[90, 0, 1, 2, 3, 91], [90, 2, 3, 4, 5, 91], [90, 3, 4, 5, 6, 91]]
    owned = [[token for token, mine in zip(w.ids, w.owned, strict=True) if mine] for w in found]
    assert owned == [[90, 0, 1, 2], [3, 4], [5, 6, 91]]
    # Tokens 2 and 3 as one word go to the window that holds both and in which they are farthest from an edge.
    text.words = [None, 0, 1, 2, 2, 3, 4, 5, None]
    assert units(text, range(1, 8))[2] == range(2, 4)
    owned = [[token for token, mine in zip(w.ids, w.owned, strict=True) if mine] for w in windows(text, 6, 2)]
    assert owned == [[90, 0, 1, 2, 3], [4], [5, 6, 91]]


def test_wrong_cases_are_printed_with_a_line_that_repeats_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_settings, "judge", lambda case: ("wrong" if case.number == 2 else "right", "said"))
    assert sweep_settings.main(["--cases", "4", "--seed", "5"]) == 1
    printed = capsys.readouterr().out
    assert "--seed 5 --case 2" in printed and "3 right, 0 refused, 1 wrong of 4 cases" in printed
    assert sweep_settings.main(["--seed", "5", "--case", "3"]) == 0
    assert "right: said" in capsys.readouterr().out


def test_a_setting_is_one_model_over_one_vocabulary() -> None:
    setting = Setting("roberta", "unigram", "float32")
    config: Any = setting.model.config
    assert config.vocab_size == len(setting.tokenizer) and config.pad_token_id == setting.tokenizer.pad_token_id
