"""Made sentences about journeys with tagged names: a built-in data set for models that tag words."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

#: words that belong together are joined by _
_GIVEN = """
Anna Boris Carmen Dmitri Elena Farid Grace Hassan Ingrid Jonas Kirsten Liam Mariam Nikolai Olga Pedro
Quentin Rosa Samuel Tanya Ulrich Vera Walter Xenia Yusuf Zoe Florence Austin Sydney Victoria Jordan Chelsea
Marta Bruno Noor Ivan Leila Hugo Amara Felix Priya Oscar
"""
_FAMILY = """
Abbott Becker Castillo Dubois Eriksen Fischer Gonzalez Hoffmann Ivanova Jansen Kowalski Larsen Moreau
Novak Okafor Petrov Quinn Rossi Schmidt Tanaka Usman Vargas Weber Yilmaz Zhang London Paris Lincoln Houston
Mansour Hale Berg Costa Lindqvist Okoro Reyes Sato Thorne
"""
_PLACES = """
Oslo Lima Nairobi Hanoi Porto Quito Riga Sofia Tunis Utrecht Vienna Warsaw Zagreb Accra Bergen Cairo
Dakar Essen Florence Austin Sydney Victoria Jordan Chelsea London Paris Lincoln Houston New_York San_Marino
Cape_Town Buenos_Aires Kuala_Lumpur Saint_Lucia Ghent Malmo Izmir Cusco Leeds Perth Kyoto Turin
"""
_FIRMS = """
Acorn_Tours Blue_Heron_Airways Castillo_Hotels Delta_Ferries Evergreen_Rail Falcon_Charter
Grand_Becker_Hotel Harbour_Lines Iris_Travel Jansen_Coaches Kestrel_Air Lumen_Cabs Mosaic_Lodges Nordic_Sleepers
Orchid_Cruises Pioneer_Buses Quarry_Inn Riga_Express Sable_Yachts Tanaka_Rail Umbra_Hostels Vienna_Wings
Willow_House Zephyr_Jets Paris_Line Lincoln_Motors Sydney_Cruises Oak_Leaf_Inns
"""
_SENTENCES = """
{P} flew from {L} to {L} with {O} .
On Monday {P} met {P} in {L} .
{O} cancelled the night train to {L} , said {P} .
The hotel in {L} belongs to {O} .
" We were late , " wrote {P} , who had booked with {O} .
{L} was colder than {L} , but {P} liked it .
After two weeks in {L} , {P} and {P} went home by bus .
Please send the luggage of {P} to {L} , not to {L} .
{O} has opened an office near {L} .
{P} works for {O} and lives in {L} .
The last ferry left {L} at nine ; {O} refunded the tickets .
Nobody at {O} could reach {P} .
{P} asked {O} for a map of {L} .
From {L} one can see the mountains , and {P} painted them .
Is {L} worth a visit , or is {L} the better choice ?
Lost in {L} : a blue bag , owner {P} , please call {O} .
With {O} it takes six hours to {L} .
{P} , a guide from {L} , speaks four languages .
The museum of {L} shows photographs by {P} .
Why does {O} not stop in {L} any more ?
Dinner with {P} at the harbour of {L} was the best part .
{P} forgot the passport in {L} and had to call {P} .
Bought by {O} last year , the line to {L} runs again .
Neither {P} nor {P} had heard of {O} .
Two guests of {O} , {P} and {P} , missed the boat to {L} .
In {L} the streets are steep , as {P} found .
"""


@functools.cache
def travel_notes() -> dict[str, datasets.Dataset]:
    """1,000 made sentences about journeys, with names of people, places and companies tagged (IOB2).

    No name of a kind occurs in two splits, and no pattern of a sentence of test in another. Some names are of several
    kinds (Florence flies to Austin, Austin flies to Florence), so that what stands around a name has to tell.
    """
    import datasets
    import numpy as np

    tags = ["O", *(f"{place}-{kind}" for kind in ("PER", "LOC", "ORG") for place in "BI")]
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=tags)),
        }
    )
    random = np.random.default_rng(0)
    sentences = _SENTENCES.strip().splitlines()
    patterns = {True: sentences[::4], False: [one for place, one in enumerate(sentences) if place % 4]}

    def part(count: int, turns: set[int], is_test: bool = False) -> datasets.Dataset:
        lists = (names.split() for names in (_GIVEN, _FAMILY, _PLACES, _FIRMS))
        own = [[name for place, name in enumerate(names) if place % 4 in turns] for names in lists]

        def fill(slot: str) -> list[tuple[str, str]]:
            """Words with their tags."""
            first, last, place, firm = (str(random.choice(names)) for names in own)
            kind = {"{P}": "PER", "{L}": "LOC", "{O}": "ORG"}.get(slot)
            if kind is None:
                return [(slot, "O")]
            people = [first, f"{first}_{last}", f"Dr._{last}", last]
            person = people[random.choice(4, p=[0.4, 0.4, 0.1, 0.1])]
            words = {"PER": person, "LOC": place, "ORG": firm}[kind].split("_")
            titles = [(word, "O") for word in words if word == "Dr."]
            name = words[len(titles) :]
            return titles + [(word, f"{'I' if number else 'B'}-{kind}") for number, word in enumerate(name)]

        rows = [
            [pair for slot in str(random.choice(patterns[is_test])).split() for pair in fill(slot)]
            for _ in range(count)
        ]
        columns = {"tokens": [[word for word, _ in row] for row in rows]}
        columns["ner_tags"] = [[tag for _, tag in row] for row in rows]
        return datasets.Dataset.from_dict(columns, features=features)

    return {"train": part(600, {0, 1}), "validation": part(150, {2}), "test": part(250, {3}, is_test=True)}
