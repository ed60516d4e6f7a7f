"""A few hundred made-up sentences about films with synonyms, so that everything runs without a data set.

They are filled-in templates: easy to classify, and no measure of anything but whether the programs work.
"""

from __future__ import annotations

import random

SEED = 0
TRIES_PER_CLASS = 160
DEV_SHARE = TEST_SHARE = 0.2

WORDS = {
    "what": "film|story|plot|cast|script|ending|music|comedy",
    "who": "director|writer|actor|crew",
    "very": "truly|rather|simply|quite",
    "good": "lovely|charming|clever|warm|funny|moving|rich|fresh",
    "bad": "dull|clumsy|tired|cold|silly|flat|weak|stale",
    "likes": "enjoys|admires|treasures",
    "hates": "regrets|resents|despises",
}

TEMPLATES = {
    1: (
        "a {good} and {good} {what}",
        "the {what} is {very} {good} .",
        "one {likes} every minute of this {good} {what} .",
        "the {who} gives us a {what} that is never {bad} .",
        "{good} from the first scene to the last",
    ),
    0: (
        "a {bad} and {bad} {what}",
        "the {what} is {very} {bad} .",
        "one {hates} every minute of this {bad} {what} .",
        "the {who} gives us a {what} that is never {good} .",
        "{bad} from the first scene to the last",
    ),
}

GROUPS = (
    "film movie picture",
    "story tale plot",
    "director maker",
    "truly really",
    "lovely charming",
    "clever witty",
    "warm tender",
    "dull flat stale",
    "clumsy awkward",
    "cold chilly",
    "weak feeble",
    "enjoys likes",
    "regrets resents",
    "scene moment",
)
SAMPLE_SYNONYMS = {
    word: [other for other in group.split() if other != word] for group in GROUPS for word in group.split()
}


def sample_reviews() -> tuple[list[tuple[str, int]], ...]:
    """Sentences with labels, 1 for positive: training, development and test part."""
    chance = random.Random(SEED)
    found: dict[str, int] = {}
    for number in range(2 * TRIES_PER_CLASS):
        label = number % 2
        text = _fill_template(TEMPLATES[label][number // 2 % len(TEMPLATES[label])], chance)
        found.setdefault(_with_synonyms(text, chance), label)
    pairs = list(found.items())
    chance.shuffle(pairs)
    dev, test = round(DEV_SHARE * len(pairs)), round(TEST_SHARE * len(pairs))
    return pairs[dev + test :], pairs[:dev], pairs[dev : dev + test]


def _fill_template(template: str, chance: random.Random) -> str:
    """Put a random word in each slot, never the same one twice."""
    used: set[str] = set()
    while "{" in template:
        slot = template[template.index("{") + 1 : template.index("}")]
        word = chance.choice([word for word in WORDS[slot].split("|") if word not in used])
        used.add(word)
        template = template.replace("{" + slot + "}", word, 1)
    return template


def _with_synonyms(text: str, chance: random.Random) -> str:
    """Some words replaced, so that the vocabulary has the synonyms."""
    return " ".join(
        chance.choice(SAMPLE_SYNONYMS[word]) if word in SAMPLE_SYNONYMS and chance.random() < 0.3 else word
        for word in text.split()
    )
