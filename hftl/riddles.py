"""Made questions with four answers each: a built-in data set for multiple choice."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

_KINDS = {
    "a fruit": "apple banana cherry grape lemon mango orange peach pear plum strawberry melon kiwi apricot fig papaya",
    "an animal": "horse cow sheep goat lion tiger wolf bear rabbit mouse elephant giraffe deer fox monkey camel",
    "a tool": "hammer saw drill wrench screwdriver chisel pliers axe shovel rake file clamp mallet crowbar trowel vice",
    "a vehicle": "car bus truck bicycle train tram boat ferry scooter van taxi plane helicopter tractor canoe sled",
    "an instrument": "violin piano guitar flute drum trumpet cello harp clarinet oboe banjo organ tuba horn viola lute",
    "a piece of clothing": "shirt coat hat scarf glove sock shoe skirt dress jacket sweater belt boot tie vest apron",
    "a profession": "doctor teacher nurse lawyer baker farmer plumber engineer judge dentist tailor pilot chef clerk "
    "butcher painter",
    "a colour": "red blue green yellow purple brown black white pink grey violet crimson beige olive scarlet indigo",
    "a part of the body": "arm leg hand foot knee elbow shoulder neck ear nose eye mouth finger toe chin wrist",
    "a piece of furniture": "table chair sofa bed desk shelf wardrobe bench stool cupboard cabinet armchair bookcase "
    "couch dresser cradle",
}
_QUESTIONS = ("Which of these is {}?", "One of the words names {}: which?", "Find {}.", "What here is {}?")


@functools.cache
def riddles() -> dict[str, datasets.Dataset]:
    """1,000 made questions which of four words is a fruit, a tool and the like; no word occurs in two splits.

    Every answer of one question is a wrong answer of others, so that the words alone say nothing.
    """
    import datasets
    import numpy as np

    random = np.random.default_rng(0)
    members = {kind: words.split() for kind, words in _KINDS.items()}
    kinds = [*members]

    def part(count: int, turns: set[int]) -> datasets.Dataset:
        rows: dict[str, list] = {"question": [], "choices": [], "answer": []}
        for number in range(count):
            asked, *others = random.permutation(len(kinds))[:4].tolist()
            drawn = [
                str(random.choice([word for place, word in enumerate(members[kinds[kind]]) if place % 4 in turns]))
                for kind in (asked, *others)
            ]
            right = number % 4
            rows["question"].append(str(random.choice(_QUESTIONS)).format(kinds[asked]))
            rows["choices"].append([*drawn[1 : right + 1], drawn[0], *drawn[right + 1 :]])
            rows["answer"].append("ABCD"[right])
        return datasets.Dataset.from_dict(rows)

    return {"train": part(600, {0, 1}), "validation": part(150, {2}), "test": part(250, {3})}
