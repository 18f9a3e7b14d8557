"""The questions that are asked about an encyclopedia article: our own wording, in the kinds that assistants are asked.

``{title}`` is the article, ``{other}`` another one, ``{lead}`` its opening text, ``{n}`` a small number; the other
fields are drawn from the lists below.
"""

from __future__ import annotations

FIELDS: dict[str, tuple[str, ...]] = {
    "audience": (
        "a ten-year-old", "a first-year student", "a tourist", "a busy manager", "a curious grandparent",
        "an expert from another field", "a class of teenagers", "someone who has never heard of it",
    ),
    "role": (
        "a patient teacher", "a sceptical journalist", "a museum guide", "a medieval traveller", "a grumpy professor",
        "a radio host", "a detective", "a cheerful robot", "a historian from the year 2300", "a ship's captain",
    ),
    "form": (
        "short story", "poem", "limerick", "diary entry", "song lyric", "fairy tale", "monologue", "news report",
        "advertisement", "dialogue between two friends", "haiku and an explanation of it", "fable with a moral",
    ),
    "message": (
        "letter to a friend", "formal email to a colleague", "thank-you note", "invitation", "blog post",
        "product review", "speech of one minute", "cover letter", "press release", "complaint to a newspaper",
    ),
    "tone": ("friendly", "formal", "humorous", "enthusiastic", "neutral", "dramatic", "very simple"),
    "n": ("three", "four", "five", "six", "seven", "ten"),
}  # fmt: skip

# Category -> (weight, templates). Weights are shares of all prompts, generated tasks included; they sum to 1.
TEMPLATES: dict[str, tuple[float, tuple[str, ...]]] = {
    "knowledge": (0.15, (
        "What is {title}?",
        "Tell me about {title}.",
        "Why does {title} matter?",
        "Explain {title} to {audience}.",
        "Give a short history of {title}.",
        "What are common misunderstandings about {title}?",
        "What should everyone know about {title}?",
        "How is {title} connected to everyday life?",
        "Describe {title} in {n} sentences.",
        "Answer as {audience} would want to hear it: what is special about {title}?",
    )),
    "list": (0.04, (
        "List {n} facts about {title}.",
        "Give {n} reasons why somebody might be interested in {title}.",
        "Make a quiz of {n} questions about {title}, with answers.",
        "Write a table of contents for a book about {title}.",
        "Suggest {n} search terms and {n} questions for research on {title}.",
    )),
    "compare": (0.05, (
        "Compare {title} and {other}.",
        "What do {title} and {other} have in common, and what sets them apart?",
        "Which is easier to explain, {title} or {other}? Give your reasons.",
        "Invent a connection between {title} and {other} and make it sound convincing.",
    )),
    "summarise": (0.05, (
        "Summarise this text in one sentence.\n\n{lead}",
        "{lead}\n\nGive the main points of the text above as a list.",
        "Write a headline and a two-sentence summary for the following passage.\n\n{lead}",
        "Shorten this for {audience}:\n\n{lead}",
    )),
    "rewrite": (0.05, (
        "Rewrite the following text in a {tone} style.\n\n{lead}",
        "Paraphrase this paragraph without changing its meaning:\n\n{lead}",
        "Turn this text into questions and answers.\n\n{lead}",
        "Continue this text with one more paragraph.\n\n{lead}",
        "Correct any mistakes in this text and improve it:\n\n{lead}",
    )),
    "extraction": (0.08, (
        "Extract all names, places and years from this text and return them as JSON.\n\n{lead}",
        "Read the text and answer: what is it about, where does it happen, and when?\n\n{lead}",
        "From the passage below, list every number with what it refers to.\n\n{lead}",
        "Return a JSON object with the keys \"topic\", \"kind\" and \"keywords\" for this text.\n\n{lead}",
        "Which sentence of this text is the most important one? Quote it and say why.\n\n{lead}",
        "Answer only from the text. What is {title}?\n\n{lead}",
        "Make a CSV table with the columns term and definition from this text:\n\n{lead}",
    )),
    "writing": (0.09, (
        "Write a {form} about {title}.",
        "Write a {message} about {title} in a {tone} tone.",
        "Write the opening paragraph of a novel in which {title} plays a part.",
        "Write a {form} that mentions both {title} and {other}.",
        "Draft an outline for an essay on {title}, then write its introduction.",
        "Describe a scene in which somebody meets {title} for the first time. Use vivid details.",
    )),
    "roleplay": (0.06, (
        "You are {role}. Tell me about {title}.",
        "Pretend to be {role} and answer my question: why should I care about {title}?",
        "Imagine that {title} could speak. What would it say about itself?",
        "Act as {role}. I will ask you about {title}. Begin by introducing yourself.",
        "Play an interview between {role} and an expert on {title}.",
    )),
    "reasoning": (0.05, (
        "What would happen if there were no {title}? Reason carefully.",
        "Is {title} more important than {other}? Argue for both sides and decide.",
        "Give one argument for and one against spending public money on {title}.",
        "Somebody says that {title} will be forgotten in fifty years. Do you agree? Explain your reasoning.",
        "Think of a riddle whose answer is {title}, and explain why it works.",
    )),
    "how_to": (0.05, (
        "How can I learn more about {title}? Give a plan in {n} steps.",
        "How would you teach {title} to {audience}?",
        "Plan a day around {title} for {audience}.",
        "What do I need in order to start a project about {title}? Give practical advice.",
        "What mistakes do beginners make when they write about {title}?",
    )),
}  # fmt: skip

# Category -> weight of prompts that are generated or have two turns.
GENERATED: dict[str, float] = {"math": 0.13, "completion": 0.10, "coding": 0.05, "follow_up": 0.05}

FOLLOW_UPS: tuple[str, ...] = (
    "Can you say that more simply?",
    "Now write it as a {form}.",
    "Give me {n} questions I could ask next.",
    "How does it compare with {other}?",
    "Summarise your answer in one sentence.",
    "Why is that important?",
    "Rewrite your answer for {audience}.",
    "Translate the main idea into plain words and give an example.",
    "What else should I know?",
)
