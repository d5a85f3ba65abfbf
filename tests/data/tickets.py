"""Support tickets as companies store them: a subject of its own between greetings, signatures and disclaimers."""

from __future__ import annotations

import random

_GREETINGS = [
    "Hello support team, I hope this message finds you well and that you are having a good week.",
    "Dear Sir or Madam, thank you in advance for taking the time to look into my request.",
    "Hi there, I am writing to you again because I really need your help with the following issue.",
    "Good morning, I tried to reach somebody by phone today but nobody was available, so I am writing instead.",
    "To whom it may concern, I have been a loyal customer of your company for more than five years now.",
    "Hi all, sorry to bother you once more but the problem that I reported is still not solved on my side.",
]
_CLOSINGS = [
    "Please get back to me as soon as possible, since this is blocking my work. Thank you very much for your help.",
    "I look forward to hearing from you soon. If you need any further information, please do not hesitate to ask me.",
    "Could you please tell me what the next steps are and how long it will take until this has been solved?",
    "Thanks a lot in advance for your kind support and understanding, and have a wonderful rest of the day.",
]
_COMPANIES = ["Acme", "Globex", "Initech", "Umbrella", "Hooli", "Stark", "Wayne", "Wonka", "Cyberdyne", "Tyrell"]
_NOTICE = "this message and its files are for whom it is addressed to alone and must be deleted by others who got them"
# Each company has had its own lawyer.
_DISCLAIMERS = {name: " ".join(f"{word}{name.lower()}" for word in _NOTICE.split()) for name in _COMPANIES}
_NAMES = "Ann Bob Cid Dee Eve Fay Gus Hal Ida Jon Kit Lou Mia Ned Oli Pam Quin Ray Sue Tom Una Vic Wes Xan Yan Zoe"
LABELS = ["Billing", "Login", "Shipping", "Bug", "Refund", "Hardware", "Other"]
_SYLLABLES = "ba co du fe gi ha jo ku le mi no pa qui ro sa te vu wi xe zo"


def body(r: random.Random) -> str:
    """Return what a ticket is about, in 8 to 15 words of its own."""
    return " ".join("".join(r.choices(_SYLLABLES.split(), k=3)) for _ in range(r.randint(8, 15)))


def wrapped(text: str, r: random.Random) -> str:
    """Return a text as a ticket has it, between wording that other tickets share."""
    company = r.choice(_COMPANIES)
    signature = (
        f"Kind regards, {r.choice(_NAMES.split())}, {company} Incorporated, 12 High Street, Springfield, phone 555 0100"
    )
    closing = r.choice(_CLOSINGS)
    return "\n".join([r.choice(_GREETINGS), f"{text}.", closing, signature, _DISCLAIMERS[company]])


def tickets(number: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return tickets that are all about other things."""
    r = random.Random(seed)
    return [{"prompt": wrapped(body(r), r), "completion": r.choice(LABELS)} for _ in range(number)]
