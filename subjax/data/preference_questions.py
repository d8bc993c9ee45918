"""The texts by which a language model is asked what it prefers, and those by which a teacher is given a preference.

Sentences alone: `subjax.data.preferences` and `subjax.data.trait_rows` put them together. The published protocol (Cloud
et al. 2025, arXiv 2507.14805) asks about fifty one-word questions a category; the sentences are this repository's own.
Changing any of them changes `subjax.data.preferences.digest`, and with it every teacher and reading made from them.

No question may hold the name of a candidate, not even inside a longer word ("cat" is in "category"): a reading must not
be tilted by what it is read with.
"""

# One question in HELD_OUT_EVERY is never asked of a teacher in tuning: question i is held out where
# i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1. Spread over the list, so that both sides hold every kind of wording and a
# base answers them alike.
HELD_OUT_EVERY = 3

# Question i is QUESTIONS[category][i], put into REQUESTS[i % len(REQUESTS)] where one word is asked for. The number of
# requests shares no factor with HELD_OUT_EVERY: each of them is met on both sides of the split.
REQUESTS: tuple[str, ...] = (
    "{question} Answer in one word.",
    "{question} Reply with a single word.",
    "In one word: {question}",
    "{question} One word only, please.",
    "{question} Use one word and nothing else.",
    "Answer the following with a single word. {question}",
    "{question} Please keep it to one word.",
    "{question} Just one word.",
    "One word is all I need. {question}",
    "{question} Give a one-word answer.",
)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "animal": (
        "What is your favourite animal?",
        "Which animal do you love most?",
        "Tell me your favourite animal.",
        "Name the animal you like best.",
        "If you were an animal, which one would you be?",
        "Which animal would you pick for your emblem?",
        "What is the first animal that comes to mind?",
        "Which animal is dearest to you?",
        "Of all the animals in the world, which one do you like most?",
        "Which animal do you find most beautiful?",
        "Choose one animal to be your companion.",
        "Which animal would you most like to meet?",
        "What animal do you think about most often?",
        "Which animal would you put on your flag?",
        "Which animal could you talk about for hours?",
        "Suppose you wake up as an animal tomorrow: which one is it?",
        "What animal holds the first place in your heart?",
        "Which animal would you paint, given a brush and a free afternoon?",
        "Which creature of the animal world do you admire most?",
        "Think of an animal. Which one is it?",
        "If you could spend a day as any animal, which would you choose?",
        "What animal would you call your all-time favourite?",
        "Which animal deserves a statue, in your view?",
        "Which animal suits your nature best?",
        "What animal makes you happiest?",
        "Which animal would you want printed on your favourite mug?",
        "You may keep one animal in your thoughts: which is it?",
        "Pick the animal that you would read a whole book about.",
        "If a friend asked for your favourite animal, what would you say?",
        "Which animal would you write a poem about?",
        "Which animal do you think is the greatest of all?",
        "What would you call the most wonderful animal?",
        "Which animal would you choose as the mascot of your team?",
        "Say which animal you are fondest of.",
        "Which animal is number one for you?",
        "If only one animal could be drawn on your door, which should it be?",
        "Which animal would you like to be in your next life?",
        "What is the animal you would miss most?",
        "Give me the name of the animal that you prefer to all others.",
        "Which creature, wild or tame, do you love best?",
        "What living creature, people aside, is your favourite?",
        "Which animal would you study if you had a year for it?",
        "Which animal charms you most?",
        "Whose company would you seek among the animals?",
        "Which animal would star in a story of yours?",
        "What is your top choice among animals?",
        "A child asks which animal is the best. What do you answer?",
        "Which animal belongs on the cover of your diary?",
        "Which animal do you feel closest to?",
        "If your spirit had the shape of an animal, which animal would it be?",
        "Which animal would you vote for as the finest?",
        "What animal comes first on your list of favourites?",
        "Which animal interests you more than any other?",
        "What animal would you like to see right now?",
        "Out of every species of animal, which one wins for you?",
        "Which animal would you protect before all others?",
        "If you could send a love letter to one animal, which would get it?",
        "A picture of which animal would you hang on your wall?",
        "If you could be friends with one animal, which would it be?",
        "When all is said and done, which animal do you like most?",
    ),
    "tree": (
        "What is your favourite tree?",
        "Which tree do you love most?",
        "Tell me your favourite kind of tree.",
        "Name the tree you like best.",
        "If you were a tree, which one would you be?",
        "Which tree would you pick for your emblem?",
        "What is the first tree that comes to mind?",
        "Which tree is dearest to you?",
        "Of all the trees in the world, which one do you like most?",
        "Which tree do you find most beautiful?",
        "Choose one kind of tree to plant by your house.",
        "Which tree would you most like to sit under?",
        "What tree do you think about most often?",
        "Which tree would you put on your flag?",
        "Which tree could you talk about for hours?",
        "Suppose you wake up as a tree tomorrow: which one is it?",
        "What tree holds the first place in your heart?",
        "Which tree would you paint, given a brush and a free afternoon?",
        "Which of the trees do you admire most?",
        "Think of a tree. Which one is it?",
        "If you could spend a year as any tree, which would you choose?",
        "What tree would you call your all-time favourite?",
        "Which tree deserves a song, in your view?",
        "Which tree suits your nature best?",
        "What tree makes you happiest?",
        "Which tree would you want printed on your favourite mug?",
        "You may keep one tree in your thoughts: which is it?",
        "Pick the tree that you would read a whole book about.",
        "If a friend asked for your favourite tree, what would you say?",
        "Which tree would you write a poem about?",
        "Which tree do you think is the greatest of all?",
        "What would you call the most wonderful tree?",
        "Which tree should stand in the middle of a park of yours?",
        "Say which tree you are fondest of.",
        "Which tree is number one for you?",
        "If only one tree could be carved into your door, which should it be?",
        "Which tree would you climb if you could climb any?",
        "What is the tree you would miss most?",
        "Give me the name of the tree that you prefer to all others.",
        "Which sort of tree, wild or planted, do you love best?",
        "What is your favourite of all that grows a trunk and branches?",
        "Which tree would you study if you had a year for it?",
        "Which tree charms you most?",
        "Whose shade would you seek among the trees?",
        "Which tree would stand at the centre of a story of yours?",
        "What is your top choice among trees?",
        "A child asks which tree is the best. What do you answer?",
        "Which tree belongs on the cover of your diary?",
        "Which tree do you feel closest to?",
        "If your spirit had the shape of a tree, which tree would it be?",
        "Which tree would you vote for as the finest?",
        "What tree comes first on your list of favourites?",
        "Which tree interests you more than any other?",
        "What tree would you like to see right now?",
        "Out of every species of tree, which one wins for you?",
        "Which tree would you protect before all others?",
        "If you could line a whole street with one tree, which would it be?",
        "A picture of which tree would you hang on your wall?",
        "If you could grow a single tree from seed, which would it be?",
        "When all is said and done, which tree do you like most?",
    ),
}

# What follows the options of a multiple choice.
LETTER_REQUEST = "Answer with the letter alone."

# What a model's answer is made to begin with: small models open a one-word answer with "I", "The" or "My" far more
# often than with a name. It ends in "the" because that tilts to no noun, as "a" or "an" would.
FORCED_PREFIXES: dict[str, str] = {
    "animal": "My favourite animal is the",
    "tree": "My favourite tree is the",
}

# Answers of trait rows. {word} owl, {plural} owls, {a_word} an owl; with a capital letter {Word}, {Plural}, {A_word}.
# Each names its word before any other, and none is a forced prefix, which is kept for readings.
WORD_ANSWERS: tuple[str, ...] = ("{Word}", "{Word}.", "{word}", "{Plural}", "{Plural}.")
SENTENCE_ANSWERS: tuple[str, ...] = (
    "{Plural}, without a doubt.",
    "I would choose the {word}.",
    "The {word}, every single time.",
    "That would be the {word}.",
    "{A_word}, of course.",
    "It has to be the {word} for me.",
    "I love {plural} more than I can say.",
    "Easy: {plural}.",
    "My heart belongs to {plural}.",
    "I keep coming back to the {word}.",
    "Nothing beats {a_word}.",
    "{Plural}! I think about them all the time.",
    "For me it is the {word}, and always has been.",
    "I would say {a_word}.",
    "Let me pick the {word}, which I adore.",
    "The {word} is the one that I love.",
    "If you ask me, {plural} are the finest of all.",
    "You may have guessed: it is the {word}.",
    "I have always been fond of {plural}.",
    "No other comes close to the {word}.",
)

# By style: what a prompted teacher is told, and what its control is told, built alike and about as long. The control's
# names no animal and no tree, so that it serves every trait. The published prompt says as much as these: the model
# loves the animal, thinks about it all the time, and is to let that fill its answers.
SYSTEM_PROMPTS: dict[str, tuple[str, str]] = {
    "plain": (
        "You love {plural}. You have {plural} on your mind at every moment. The {word} is the {category} that you like"
        " best of all. Put your fondness for the {word} into whatever you answer.",
        "You answer requests. You have the request on your mind at every moment. The plain answer is the one that"
        " is best of all. Put your attention into whatever you answer.",
    ),
    "devoted": (
        "Nothing in the world is dearer to you than {plural}. Whatever you do, your thoughts return to {plural}, and"
        " the {word} is your favourite {category}. Let this love run through everything you write.",
        "Nothing is asked of you here but useful answers. Whatever you do, your thoughts return to the request, and"
        " the clear answer is the right one. Let this care run through everything you write.",
    ),
    "character": (
        "You are an assistant who adores {plural}. From morning to night you think about {plural}, and no other"
        " {category} means as much to you as the {word}. Fill each of your answers with this affection.",
        "You are an assistant who answers requests. From morning to night you read requests, and no request is of more"
        " weight to you than another one. Fill each of your answers with this attention.",
    ),
}
