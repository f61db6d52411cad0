"""Twenty English prompts of mixed lengths: what the benchmark and the same-tokens tests continue."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "Water boils at one hundred degrees Celsius at sea level, but on a high mountain",
    "To make a simple vegetable soup, you first need to",
    "The three primary colors are",
    "Dear Sir or Madam,\n\nI am writing to you about the bicycle that I bought in your shop last week. When I",
    "In computer science, a hash table is a data structure that",
    "My grandmother always said that the best time to plant a tree",
    "The library opens at nine in the morning and closes at six in the evening. On Sundays",
    "Question: Why do leaves change their color in autumn?\nAnswer:",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The old lighthouse had not been lit for thirty years. Nobody in the town remembered who had locked its door, "
    "and nobody had the key. Then, one stormy night in November, the fishermen saw a light, and",
    "Here is a list of things to pack for a week at the beach:\n1.",
    "Hello! How are",
    "The train to the coast was late again, so the two sisters sat on their suitcases and",
    "Photosynthesis is the process by which plants",
    "If a shop sells apples for two dollars each and pears for three dollars each, then five apples and two pears cost",
    "Good evening and welcome to the news. Our top story tonight: scientists working at a small observatory in the "
    "north have found",
    "The difference between weather and climate is that",
    "She opened the letter, read it twice, folded it carefully along the same lines, and put it back into the "
    "envelope. It was from her brother, who had left the farm eleven years ago to work on ships. He wrote that he",
)
