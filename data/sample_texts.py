"""A few hundred made-up questions and news titles, so that everything runs without a data set.

They are filled-in templates: easy to classify, and no measure of anything but whether the programs work.
"""

from __future__ import annotations

import random

import torch

from data.text import TextData, split_by_seed

SEED = 0
TRIES_PER_CLASS = 60
TEST_SHARE = 0.25

WORDS = {
    "thing": "a lantern|a compass|a glacier|an orchard|a violin|a comet|a sundial|a harbour|a bridge|a windmill",
    "things": "bees|tides|candles|magnets|mirrors|clouds|kites|shells|clocks|seeds",
    "animal": "owl|otter|heron|badger|salmon|beetle|fox|hare",
    "person": "a baker|a sailor|a painter|a gardener|a pilot|a weaver|a tailor|a singer",
    "deed": "invented the zip|painted the ceiling|built the lighthouse|wrote the anthem|crossed the strait"
    "|founded the museum|designed the clock tower|climbed the north face",
    "place": "Lisbon|Oslo|Nairobi|Quito|Hanoi|Tunis|Dublin|Perth",
    "site": "the longest tunnel|the oldest library|the deepest lake|the tallest dam|the largest market",
    "letters": "RAM|NASA|UNO|GPS|DNA|PDF|BBC|VAT",
    "count": "bridges|islands|strings|legs|players|pages|languages|stairs",
    "owner": "the old town|a spider|a harp|the archipelago|a chess set|the cathedral|an orchestra|the library",
    "team": "rovers|falcons|mariners|comets|wanderers|giants|pilots|foxes",
    "sport": "semi-final|derby|cup tie|title race|season opener|relay|play-off",
    "country": "norway|kenya|peru|vietnam|tunisia|ireland|nepal|chile",
    "state": "ohio|texas|maine|oregon|utah|iowa|georgia|nevada",
    "firm": "bank|carmaker|airline|retailer|brewer|insurer|shipyard|chip maker",
    "illness": "asthma|flu|migraine|diabetes|measles|allergy|insomnia|arthritis",
    "artist": "singer|director|actress|novelist|rapper|comedian|drummer|cellist",
    "device": "telescope|phone|probe|robot|satellite|browser|battery|microscope",
}

QUESTIONS = {
    "ABBR": (
        "What does {letters} stand for ?",
        "What is the abbreviation of the words behind {letters} ?",
        "What is the full form of {letters} ?",
        "What do the letters {letters} mean ?",
    ),
    "DESC": (
        "What is {thing} ?",
        "Why do {things} change with the seasons ?",
        "How is {thing} made ?",
        "How do {things} work ?",
        "What is the purpose of {thing} ?",
    ),
    "ENTY": (
        "What colour is {thing} in the old fable ?",
        "What {animal} appears on the coat of arms of {place} ?",
        "What kind of food does the {animal} prefer ?",
        "Which instrument is played at festivals in {place} ?",
    ),
    "HUM": (
        "Who {deed} ?",
        "Who was the first person who {deed} ?",
        "What is the name of {person} who {deed} ?",
        "Which family {deed} in {place} ?",
    ),
    "LOC": (
        "Where is {site} ?",
        "What city has {site} ?",
        "What country is {place} in ?",
        "Where can one see {thing} near {place} ?",
    ),
    "NUM": (
        "How many {count} does {owner} have ?",
        "When was {site} opened ?",
        "How far is it from {place} to {place} ?",
        "How old is {site} ?",
        "What year did {person} arrive in {place} ?",
    ),
}

TITLES = {
    "Sport": (
        "{team} beat {team} in {sport}",
        "injured captain misses {sport} against {team}",
        "late goal sends {team} into {sport}",
        "coach of {team} praises squad after {sport}",
    ),
    "World": (
        "{country} and {country} resume border talks",
        "thousands march in capital of {country}",
        "parliament of {country} elects new president",
        "floods force villagers from homes in {country}",
    ),
    "U.S.": (
        "{state} governor signs school bill",
        "judge in {state} rules on voting districts",
        "storm leaves towns in {state} without power",
        "senator from {state} to retire next year",
    ),
    "Business": (
        "{firm} shares fall after profit warning",
        "{firm} to buy rival in cash deal",
        "oil price lifts costs at {firm}",
        "{firm} cuts jobs as quarterly sales drop",
    ),
    "Health": (
        "study links diet to {illness}",
        "new drug eases {illness} in trial, doctors say",
        "patients with {illness} wait longer for treatment",
        "exercise may lower the risk of {illness}",
    ),
    "Entertainment": (
        "{artist} opens film festival with family drama",
        "{artist} wins award for debut album",
        "{artist} returns to the stage after ten years",
        "review: {artist} shines in thin comedy",
    ),
    "Sci&Tech": (
        "engineers test {device} in orbit",
        "new {device} maps faint galaxies",
        "software update fixes flaw in {device}",
        "researchers build {device} from paper",
    ),
}


def sample_questions(class_names: tuple[str, ...]) -> TextData:
    """A few hundred questions of the UIUC classes."""
    return _fill("questions", QUESTIONS, class_names)


def sample_titles(class_names: tuple[str, ...]) -> TextData:
    """A few hundred titles of the TagMyNews classes."""
    return _fill("news", TITLES, class_names)


def _fill(name: str, templates: dict[str, tuple[str, ...]], class_names: tuple[str, ...]) -> TextData:
    chance = random.Random(SEED)
    texts: dict[str, int] = {}
    for label, class_name in enumerate(class_names):
        for number in range(TRIES_PER_CLASS):
            texts.setdefault(_fill_template(templates[class_name][number % len(templates[class_name])], chance), label)
    all_texts, labels = list(texts), list(texts.values())
    parts = split_by_seed(len(texts), TEST_SHARE, SEED)
    (train, test), (train_y, test_y) = (
        [[all_texts[n] for n in part] for part in parts],
        [torch.tensor([labels[n] for n in part]) for part in parts],
    )
    return TextData(name, f"built-in-{len(texts)}", class_names, train, train_y, test, test_y)


def _fill_template(template: str, chance: random.Random) -> str:
    """Put a random word in each slot, never the same one twice."""
    used: set[str] = set()
    while "{" in template:
        slot = template[template.index("{") + 1 : template.index("}")]
        word = chance.choice([word for word in WORDS[slot].split("|") if word not in used])
        used.add(word)
        template = template.replace("{" + slot + "}", word, 1)
    return template
