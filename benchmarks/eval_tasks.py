"""Tasks to measure scoring with: five shapes of evaluation, as lm-eval task files over local data, from a fixed seed.

The public question sets are read from a folder that the caller names (`arithmetic/`, `blimp/`, `gsm8k/`); without it,
or where a file is missing, questions of the same form and length are generated, and the case says so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Doc = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One task file: lm-eval's name of it, what it measures, where its questions are from, how many are taken."""

    key: str
    task: str
    title: str
    source: str
    items: int


PEOPLE = [
    "Mara",
    "Ilan",
    "Petra",
    "Osric",
    "Leda",
    "Tomas",
    "Wren",
    "Anselm",
    "Jonna",
    "Ruben",
    "Salome",
    "Idris",
]
GOODS = [
    "lanterns",
    "ropes",
    "kettles",
    "ledgers",
    "saddles",
    "violins",
    "blankets",
    "compasses",
    "barrels",
    "mirrors",
    "candles",
    "maps",
]
TOWNS = [
    "harbour",
    "library",
    "observatory",
    "bakery",
    "monastery",
    "lighthouse",
    "orchard",
    "quarry",
    "workshop",
    "chapel",
]
REASONS = (
    "because the rain had ruined the road to the market",
    "although nobody in the village had asked for it",
    "and was paid with a basket of apples and some cheese",
    "before the bells had rung for the second time",
    "while the others were still asleep under the cart",
    "since the old bridge would not carry the weight",
)
PLACES = (
    "under the third arch of the bridge",
    "behind the shed of the blacksmith",
    "inside the hollow trunk of an oak",
    "between two sacks of barley flour",
    "on the highest shelf of the pantry",
    "below the stairs of the town hall",
    "next to the broken well in the yard",
    "among the ferns along the north wall",
)

# reasoning written out, one item per example; the prompts of the generation case
REASONED = (
    (
        "A gardener plants 6 rows of tulips with 9 bulbs in each row. Mice eat 11 of the bulbs. How many are left?",
        "The gardener plants 6 * 9 = 54 bulbs. The mice eat 11 of them, so 54 - 11 = 43 are left. The answer is 43.",
    ),
    (
        (
            "A ferry takes 28 cars on each trip. It makes 4 trips in the morning and 3 in the afternoon. How many cars can"
            " it take in a day?"
        ),
        (
            "In a day the ferry makes 4 + 3 = 7 trips. On each of them it takes 28 cars, so it can take 7 * 28 = 196 cars."
            " The answer is 196."
        ),
    ),
    (
        "Noor has 75 stamps. She gives a third of them to her cousin and then buys 12 new ones. How many has she now?",
        (
            "A third of 75 is 75 / 3 = 25. After giving them away Noor has 75 - 25 = 50 stamps. With the new ones she has"
            " 50 + 12 = 62. The answer is 62."
        ),
    ),
    (
        (
            "A baker sells rolls at 2 coins and loaves at 5 coins. One morning he sells 40 rolls and 16 loaves. How many"
            " coins does he take?"
        ),
        (
            "The rolls bring 40 * 2 = 80 coins. The loaves bring 16 * 5 = 80 coins. Together that is 80 + 80 = 160 coins."
            " The answer is 160."
        ),
    ),
    (
        (
            "A tank holds 300 litres and is one half full. A pump adds 15 litres a minute. How many minutes does it take to"
            " fill the tank?"
        ),
        (
            "The tank holds 300 / 2 = 150 litres at first, so 300 - 150 = 150 are missing. At 15 litres a minute that takes"
            " 150 / 15 = 10 minutes. The answer is 10."
        ),
    ),
    (
        "There are 18 goats and twice as many sheep on a hill. In the evening 9 sheep go home. How many animals stay?",
        (
            "There are 18 * 2 = 36 sheep. After the evening 36 - 9 = 27 sheep are there. With the goats, 27 + 18 = 45"
            " animals stay. The answer is 45."
        ),
    ),
    (
        (
            "Emil reads 24 pages on Monday, 8 pages more on Tuesday, and half as many as on Tuesday on Wednesday. How many"
            " pages does he read in all?"
        ),
        (
            "On Tuesday Emil reads 24 + 8 = 32 pages. On Wednesday he reads 32 / 2 = 16 pages. In all he reads"
            " 24 + 32 + 16 = 72 pages. The answer is 72."
        ),
    ),
    (
        (
            "A hall has 15 rows of 20 chairs. For a concert 4 rows are taken out, and 205 people come. How many chairs stay"
            " empty?"
        ),
        (
            "After 4 rows are taken out, 15 - 4 = 11 rows are there, which have 11 * 20 = 220 chairs. With 205 people,"
            " 220 - 205 = 15 chairs stay empty. The answer is 15."
        ),
    ),
)


def write_cases(folder: Path, data: Path | None, chosen: str, counts: dict[str, int]) -> list[Case]:
    """Write the chosen cases' task files and data to `folder`, which is then lm-eval's include path.

    chosen: letters of CASES. counts: items per letter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for key in chosen:
        name, title, make = CASES[key]
        docs, source, task = make(random.Random(f"evals {key}"), data, counts[key])
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "num_fewshot": 0,
        }
        text = json.dumps(common | task, indent=1)  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        cases.append(Case(key, name, title, source, len(docs)))
    return cases


def fixed_shots(docs: list[Doc]) -> dict[str, Any]:
    """The same examples, in the same order, before every item."""
    return {"num_fewshot": len(docs), "fewshot_config": {"sampler": "first_n", "samples": docs}}


def accuracy(*names: str) -> list[Doc]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def rows(data: Path | None, name: str) -> list[Doc] | None:
    """A public file's rows, None where it is not there."""
    path = data / f"{name}.jsonl" if data is not None else None
    if path is None or not path.is_file():
        return None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


Made = tuple[list[Doc], str, dict[str, Any]]
GENERATED = "generated, seeded"


def long_choice(rng: random.Random, data: Path | None, count: int) -> Made:
    """A story of about 350 tokens, a question about it, four options of a few tokens."""
    docs = []
    for _ in range(count):
        moves = [
            (rng.choice(PEOPLE), rng.randint(2, 40), rng.choice(GOODS), rng.choice(TOWNS)) for _ in range(11)
        ]
        story = " ".join(
            f"{who} carried {number} {what} from the {rng.choice(TOWNS)} to the {where} {rng.choice(REASONS)}."
            for who, number, what, where in moves
        )
        who, number, what, where = rng.choice(moves)
        options = [where, *rng.sample([town for town in TOWNS if town != where], 3)]
        rng.shuffle(options)
        docs.append(
            {
                "story": story,
                "question": f"Where did {who} carry the {number} {what}?",
                "options": [f"to the {option} of the town" for option in options],
                "gold": options.index(where),
            }
        )
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{story}}\n\nQuestion: {{question}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": accuracy("acc", "acc_norm"),
    }
    return docs, GENERATED, task


def arithmetic(rng: random.Random, data: Path | None, count: int) -> Made:
    """Two-digit additions after five fixed ones; the log-likelihood of the right answer."""
    found = rows(data, "arithmetic/two_digit_addition")
    if found is None:
        source, docs = GENERATED, []
        for _ in range(count):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            docs.append({"question": f"What is {a} plus {b}?", "answer": str(a + b)})
    else:
        source = "arithmetic/two_digit_addition"
        docs = [
            {
                "question": row["context"].strip().removeprefix("Q: ").removesuffix("A:").strip(),
                "answer": row["completion"].strip(),
            }
            for row in rng.sample(found, min(count, len(found)))
        ]
    shots = [
        {"question": f"What is {a} plus {b}?", "answer": str(a + b)}
        for a, b in ((13, 48), (70, 5), (36, 36), (91, 27), (8, 64))
    ]
    task = {
        "output_type": "loglikelihood",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": accuracy("acc"),
        **fixed_shots(shots),
    }
    return docs, source, task


BLIMP = (
    "anaphor_number_agreement",
    "determiner_noun_agreement_1",
    "irregular_past_participle_verbs",
    "wh_island",
)


def pairs(rng: random.Random, data: Path | None, count: int) -> Made:
    """Minimal pairs without any context: which sentence is likelier."""
    sets = [rows(data, f"blimp/{name}") for name in BLIMP]
    if all(found is not None for found in sets):
        source = "blimp/" + ", ".join(BLIMP)
        every = [row for found in sets for row in found or []]
        docs = [
            {"good": row["sentence_good"], "bad": row["sentence_bad"]}
            for row in rng.sample(every, min(count, len(every)))
        ]
    else:
        source, docs = GENERATED, []
        for _ in range(count):
            who, near = rng.choice(GOODS), rng.choice(TOWNS)
            verb = rng.choice(("seem", "look", "stay", "appear"))
            end = f"{rng.choice(('old', 'broken', 'heavy', 'lost'))} to {rng.choice(PEOPLE)}."
            good = f"The {who} near the {near} {verb} {end}"
            docs.append({"good": good, "bad": good.replace(f" {verb} ", f" {verb}s ")})
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "metric_list": accuracy("acc"),
    }
    return docs, source, task


def reasoning(rng: random.Random, data: Path | None, count: int) -> Made:
    """Word problems after eight fixed ones with the reasoning written out; up to 64 tokens are generated."""
    found = rows(data, "gsm8k/test")
    if found is None:
        source, docs = GENERATED, []
        for _ in range(count):
            who, other = rng.sample(PEOPLE, 2)
            a, b, c = rng.randint(12, 90), rng.randint(2, 9), rng.randint(2, 11)
            what = rng.choice(GOODS)
            docs.append(
                {
                    "question": f"{who} keeps {a} {what} at the {rng.choice(TOWNS)} and buys {b} boxes with {c} {what}"
                    f" in each of them. Then {who} gives {b} of all the {what} to {other}, who had none before. How"
                    f" many {what} does {who} keep in the end?",
                    "answer": str(a + b * c - b),
                }
            )
    else:
        source = "gsm8k/test"
        docs = [
            {"question": row["question"], "answer": row["answer"].split("####")[-1].strip()}
            for row in rng.sample(found, min(count, len(found)))
        ]
    shots = [{"question": question, "answer": answer} for question, answer in REASONED]
    take = {"function": "take_first"}
    task = {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Q:", "</s>", "<|im_end|>"], "max_gen_toks": 64, "do_sample": False},
        "filter_list": [
            {
                "name": "strict",
                "filter": [
                    {"function": "regex", "regex_pattern": "The answer is (-?[0-9.,]+)\\."},
                    take,
                ],
            },
            {
                "name": "flexible",
                "filter": [
                    {"function": "regex", "regex_pattern": "(-?[0-9][0-9.,]*)", "group_select": -1},
                    take,
                ],
            },
        ],
        "metric_list": [{**accuracy("exact_match")[0], "regexes_to_ignore": [",", "\\.$"]}],
        **fixed_shots(shots),
    }
    return docs, source, task


def shot_choice(rng: random.Random, data: Path | None, count: int) -> Made:
    """Five fixed examples, a short question, four options of at least three tokens."""

    def doc(random_: random.Random) -> Doc:
        who, what = random_.choice(PEOPLE), random_.choice(GOODS)
        there, *others = random_.sample(PLACES, 4)
        options = [there, *others]
        random_.shuffle(options)
        return {
            "question": f"{who} wanted to keep the {what} dry, and left them {there}. {random_.choice(PEOPLE)} came"
            f" back at night. Where were the {what}?",
            "options": options,
            "gold": options.index(there),
        }

    shots = [doc(random.Random(f"shot {i}")) for i in range(5)]
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": accuracy("acc", "acc_norm"),
        **fixed_shots(shots),
    }
    return [doc(rng) for _ in range(count)], GENERATED, task


Make = Callable[[random.Random, Path | None, int], Made]
CASES: dict[str, tuple[str, str, Make]] = {
    "a": ("bench_long_choice", "0-shot, long context, four options", long_choice),
    "b": ("bench_arithmetic", "5 fixed shots, one answer", arithmetic),
    "c": ("bench_pairs", "0-shot sentence pairs", pairs),
    "d": ("bench_reasoning", "8 fixed shots, 64 tokens generated", reasoning),
    "e": ("bench_shot_choice", "5 fixed shots, four options of 3 tokens or more", shot_choice),
}
ITEMS = {"a": 16, "b": 200, "c": 200, "d": 16, "e": 48}
QUICK = {"a": 2, "b": 6, "c": 16, "d": 2, "e": 2}


def texts(data: Path | None = None) -> list[str]:
    """Text of all cases, for a tokenizer to be made from."""
    found = [f"Question: Answer: Q: A: The answer is {question} {answer}" for question, answer in REASONED]
    for key, (_, _, make) in CASES.items():
        docs, _, _ = make(random.Random(f"texts {key}"), data, 200)
        found += [json.dumps(doc, ensure_ascii=False) for doc in docs]
    return found
