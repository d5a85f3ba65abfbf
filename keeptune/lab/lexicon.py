"""The words of the world: nothing arrives; names, things, verbs and their forms in English and in Velli leave."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_NAMES = (
    "Ada", "Alva", "Arno", "Bela", "Berit", "Bruno", "Cara", "Cosmo", "Dana", "Dorin", "Edda", "Elmo", "Enid",
    "Falk", "Fern", "Gero", "Greta", "Hale", "Hilda", "Ivo", "Jarek", "Jora", "Kalle", "Karin", "Lenz", "Lotte",
    "Magda", "Malo", "Mara", "Milo", "Nadia", "Nils", "Odo", "Olga", "Perla", "Pim", "Quin", "Rada", "Rolf", "Runa",
    "Sanna", "Silas", "Tilda", "Tobin", "Ula", "Urs", "Vera", "Wanda", "Yorn", "Zora",
)  # fmt: skip
FAMILY_NAMES = (
    "Aske", "Barrow", "Birk", "Calder", "Corvin", "Dorn", "Elster", "Fenner", "Garrick", "Hask", "Holm", "Jessel",
    "Kern", "Lindo", "Marl", "Nerrin", "Oster", "Pell", "Quillon", "Rask", "Sorrel", "Tarn", "Tolley", "Umber",
    "Venn", "Wick", "Yarrow", "Zell",
)  # fmt: skip
PLACES = (
    "Abbeck", "Arlow", "Birra", "Brenfold", "Carda", "Dunmere", "Elsin", "Farrow", "Galt", "Grenna", "Harth",
    "Holloway", "Istrel", "Jorvik", "Kellin", "Lomar", "Marden", "Nessa", "Oldry", "Orlen", "Penwick", "Quarn",
    "Rimmel", "Sarn", "Tessaly", "Thorn", "Ulmet", "Varda", "Wexley", "Yarrick",
)  # fmt: skip
REGIONS = ("the north", "the south", "the east", "the west", "the marshes", "the hills")
RIVERS = ("the Ash", "the Bray", "the Corl", "the Dee", "the Elm", "the Fenn", "the Gall", "the Isk")
ANIMALS = ("cat", "dog", "goat", "goose", "hen", "horse", "owl", "pig", "rabbit", "sheep")
FOODS = ("apples", "beans", "bread", "cheese", "eggs", "fish", "honey", "nuts", "pears", "plums", "soup", "turnips")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SPOTS = ("bridge", "church", "harbour", "inn", "market", "mill", "orchard", "school", "square", "well")
TOPICS = ("building", "harvest", "market", "music", "school", "weather")

# Trade: the tool it uses and the ware it makes.
TRADES = {
    "baker": ("oven", "loaf"),
    "basket maker": ("willow knife", "basket"),
    "beekeeper": ("smoke can", "honey jar"),
    "bookbinder": ("press", "book"),
    "carpenter": ("saw", "table"),
    "clockmaker": ("file", "clock"),
    "cobbler": ("awl", "boot"),
    "cooper": ("hoop", "barrel"),
    "fisher": ("net", "smoked fish"),
    "gardener": ("spade", "rose"),
    "glazier": ("diamond cutter", "window"),
    "hatter": ("steam block", "hat"),
    "jeweller": ("tweezers", "ring"),
    "mason": ("chisel", "wall"),
    "miller": ("millstone", "flour sack"),
    "painter": ("brush", "picture"),
    "potter": ("wheel", "jug"),
    "printer": ("type case", "poster"),
    "rope maker": ("twisting hook", "rope"),
    "saddler": ("leather punch", "saddle"),
    "smith": ("hammer", "horseshoe"),
    "tailor": ("needle", "coat"),
    "weaver": ("loom", "blanket"),
    "wheelwright": ("drawknife", "cart"),
}

# Kind of event: how it is told in the past tense about a person who took part.
EVENTS = {
    "flood": "led the people to the church tower",
    "fire": "carried water from the well all night",
    "fair": "won the first prize",
    "storm": "saved the boats",
    "strike": "spoke for the workers",
    "wedding": "played the fiddle",
    "siege": "opened the gate",
    "frost": "shared the last wood",
}


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb that takes an object, in the forms that the world uses, and its stem in Velli."""

    plain: str
    present: str
    past: str
    velli: str


VERBS = tuple(
    Verb(*line.split())
    for line in """bring brings brought dara
build builds built keto
buy buys bought mosi
carry carries carried luna
clean cleans cleaned feshi
count counts counted numa
draw draws drew pirra
drop drops dropped balo
find finds found soki
hide hides hid vasha
hold holds held tema
keep keeps kept rono
lift lifts lifted haru
lose loses lost ganti
make makes made olmi
mend mends mended jeva
paint paints painted kulo
pull pulls pulled zedi
see sees saw ibra
sell sells sold wanu
send sends sent parsi
take takes took etho
want wants wanted duvi
wash washes washed shola""".splitlines()
)

# Nouns that can be the object of any of the verbs, with their word in Velli.
NOUNS = {
    "apple": "mela", "bag": "torbu", "ball": "rondi", "barrel": "koffa", "basket": "semba", "bell": "dinga",
    "blanket": "varmo", "boat": "nava", "book": "libru", "boot": "stivo", "bottle": "glasu", "bowl": "skali",
    "box": "kassi", "bread": "pano", "broom": "vishti", "bucket": "emmer", "cake": "torti", "candle": "lumi",
    "cap": "hetta", "cart": "vagu", "chair": "seti", "cheese": "kesso", "clock": "horu", "coat": "mantu",
    "cup": "tazi", "door": "porru", "drum": "tambu", "egg": "ovi", "fence": "zauno", "flag": "bando",
    "flute": "fifo", "hammer": "malo", "hat": "kapelu", "jug": "kruga", "key": "shali", "knife": "messi",
    "ladder": "skara", "lamp": "lanti", "map": "karto", "mirror": "spegu", "net": "redo", "paddle": "ruddi",
    "pear": "birni", "picture": "bildu", "pot": "olla", "ring": "anello", "rope": "tauvi", "rose": "rozu",
    "saddle": "sella", "saw": "sagi", "shovel": "lopatu", "spoon": "loffi", "stone": "petra", "table": "mensu",
    "tent": "zelto", "torch": "fakli", "vase": "vazo", "wheel": "radu", "window": "fenu", "wreath": "kranzi",
}  # fmt: skip
ADJECTIVES = {
    "big": "granu", "black": "neri", "blue": "azu", "broken": "rotti", "clean": "puri", "cold": "frizi",
    "dark": "tumni", "dry": "sekku", "fine": "belu", "green": "verdu", "heavy": "pesi", "light": "legu",
    "long": "langi", "new": "novi", "old": "vetu", "red": "rossi", "round": "kurbu", "small": "pikku",
    "strong": "forzu", "white": "albi",
}  # fmt: skip
PAST_SUFFIX = "ta"
