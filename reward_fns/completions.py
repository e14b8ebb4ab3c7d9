"""The text of a completion, however the trainer hands it over."""

from collections.abc import Mapping, Sequence


def completion_text(completion: object) -> str:
    """Text that the model wrote last.

    Args:
        completion: a string (plain-text data); a list of messages (conversational data), of which the last one by the
            assistant counts, a message without a role being the assistant's; one message; or None. The content of a
            message is a string, None, or a list of parts (`{"type": "text", "text": ...}`), of which the texts count.

    Returns:
        The text, "" where there is none: None, an empty list, a message with nothing but tool calls.

    Raises:
        ValueError: anything else, which no TRL trainer sends.
    """
    if completion is None:
        return ""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return _content_text(completion.get("content"))
    if isinstance(completion, Sequence):
        for message in reversed(completion):
            if not isinstance(message, Mapping):
                raise ValueError(
                    f"a completion holds {message!r:.200}, a {type(message).__name__}, where a message is expected: "
                    "pass completions as strings or as lists of {'role': ..., 'content': ...}."
                )
            if message.get("role", "assistant") == "assistant":
                return _content_text(message.get("content"))
        return ""
    raise ValueError(
        f"a completion is {completion!r:.200}, a {type(completion).__name__}: pass completions as strings or as lists "
        "of {'role': ..., 'content': ...}."
    )


def _content_text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    raise ValueError(
        f"the content of a message is {content!r:.200}, a {type(content).__name__}: it must be a string, None or a "
        "list of parts such as {'type': 'text', 'text': ...}."
    )
