"""A reward function, as a user writes one."""


def short_and_polite(prompts, responses, prompt_tokens, response_tokens):
    """One float for each response: politeness less a little for length."""
    assert len(prompts) == len(responses) == len(prompt_tokens) == len(response_tokens)
    return [float("please" in text) - 0.01 * len(ids) for text, ids in zip(responses, response_tokens, strict=True)]


def too_few(prompts, responses, prompt_tokens, response_tokens):
    return [0.0]
