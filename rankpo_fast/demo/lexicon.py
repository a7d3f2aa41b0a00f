"""The words of the demo's world: fields, places, ranks, and the sentences that carry them.

Data only. `world.py` fills the braces: {term}, {city}, {n} (a number) and so on; {Title} is {title}
with a capital.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """A research field: its names, and what people in it work on (neighbours share terms)."""

    names: tuple[str, ...]
    terms: tuple[str, ...]


def _field(names: str, terms: str) -> Field:
    return Field(tuple(names.split(", ")), tuple(terms.split(", ")))


# Four clusters of four; the fields of a cluster are each other's neighbours.
FIELD_CLUSTERS: tuple[tuple[Field, ...], ...] = (
    (
        _field(
            "computer vision, visual computing, image understanding",
            "object detection, depth estimation, image segmentation, video tracking, 3D "
            "reconstruction, "
            "pose estimation, scene graphs, neural networks, self-supervised pretraining",
        ),
        _field(
            "natural language processing, computational linguistics, language technology",
            "machine translation, dialogue systems, syntactic parsing, summarisation, text "
            "retrieval, "
            "entity linking, speech transcripts, neural networks, self-supervised pretraining",
        ),
        _field(
            "robotics, autonomous systems, robot learning",
            "grasp planning, legged locomotion, visual servoing, motion planning, tactile sensing, "
            "drone swarms, simulation transfer, reinforcement learning, pose estimation",
        ),
        _field(
            "human-computer interaction, interaction design, usability research",
            "eye tracking, accessible interfaces, user studies, virtual reality, wearable devices, "
            "participatory design, haptic feedback, dialogue systems, information displays",
        ),
    ),
    (
        _field(
            "immunology, immune biology, the study of immunity",
            "T cell receptors, vaccine response, cytokine signalling, autoimmune disease, "
            "antibodies, "
            "innate immunity, mucosal defence, single-cell sequencing, flow cytometry",
        ),
        _field(
            "neuroscience, brain science, neurobiology",
            "synaptic plasticity, hippocampal circuits, calcium imaging, sleep rhythms, motor "
            "cortex, "
            "glial cells, sensory coding, optogenetics, single-cell sequencing",
        ),
        _field(
            "epidemiology, public health, population health",
            "outbreak models, cohort studies, screening programmes, health inequality, vaccine "
            "response, "
            "contact networks, dietary exposure, causal inference, survival analysis",
        ),
        _field(
            "genetics, genomics, heredity research",
            "gene regulation, rare variants, population history, genome assembly, linkage maps, "
            "epigenetic marks, transposons, single-cell sequencing, CRISPR screens",
        ),
    ),
    (
        _field(
            "materials science, materials engineering, advanced materials",
            "battery cathodes, alloy fatigue, thin films, ceramic coatings, polymer composites, "
            "grain boundaries, hydrogen embrittlement, electron microscopy, phase diagrams",
        ),
        _field(
            "photonics, optical engineering, optics",
            "silicon waveguides, ultrafast lasers, frequency combs, metasurfaces, fibre sensors, "
            "light detectors, nonlinear crystals, quantum emitters, thin films",
        ),
        _field(
            "condensed matter physics, solid-state physics, quantum matter",
            "superconductors, spin liquids, topological phases, neutron scattering, moire layers, "
            "magnetic order, charge density waves, quantum emitters, phase diagrams",
        ),
        _field(
            "physical chemistry, chemical physics, theoretical chemistry",
            "reaction dynamics, electronic structure, surface catalysis, molecular spectroscopy, "
            "solvation, density functionals, electrolytes, ultrafast lasers, battery cathodes",
        ),
    ),
    (
        _field(
            "climate science, climatology, atmospheric science",
            "monsoon shifts, aerosol forcing, ice cores, ocean heat uptake, regional downscaling, "
            "extreme heat, cloud feedback, carbon budgets, satellite records",
        ),
        _field(
            "hydrology, water resources, catchment science",
            "flood forecasts, groundwater recharge, snow melt, river ecology, drought risk, "
            "soil moisture, tracer tests, satellite records, extreme rainfall",
        ),
        _field(
            "ecology, biodiversity research, conservation biology",
            "pollinator decline, food webs, invasive species, forest plots, species distribution, "
            "bird migration, seed dispersal, river ecology, carbon budgets",
        ),
        _field(
            "environmental economics, resource economics, climate policy",
            "emission trading, fishery quotas, energy demand, land use change, carbon budgets, "
            "discount rates, water markets, drought risk, causal inference",
        ),
    ),
)


def _places(text: str) -> dict[str, tuple[str, ...]]:
    """`Sweden: Uppsala, Lund; Norway: Oslo` -> the cities of each country."""
    pairs = (entry.split(": ") for entry in text.split("; "))
    return {country: tuple(cities.split(", ")) for country, cities in pairs}


# A job and a talent agree in geography when their cities lie in the same region.
REGIONS: tuple[dict[str, tuple[str, ...]], ...] = (
    _places(
        "Sweden: Uppsala, Lund, Gothenburg; "
        "Norway: Oslo, Bergen, Trondheim; "
        "Finland: Helsinki, Turku, Oulu"
    ),
    _places(
        "France: Lyon, Toulouse, Grenoble; "
        "Germany: Munich, Leipzig, Aachen; "
        "Spain: Valencia, Granada, Bilbao"
    ),
    _places(
        "England: Leeds, Bristol, Durham; "
        "Scotland: Glasgow, Dundee, Aberdeen; "
        "Ireland: Dublin, Cork, Galway"
    ),
    _places(
        "Canada: Montreal, Calgary, Halifax; "
        "the United States: Boston, Seattle, Austin; "
        "Mexico: Puebla, Merida"
    ),
    _places(
        "Japan: Kyoto, Sendai, Osaka; "
        "South Korea: Daejeon, Seoul, Busan; "
        "Taiwan: Taipei, Hsinchu, Tainan"
    ),
)

INSTITUTIONS = (
    "the University of {city}",
    "{city} University",
    "the {city} Institute of Technology",
    "the {city} campus",
    "a research centre in {city}",
)


@dataclass(frozen=True)
class Rank:
    """A step of the academic ladder: what jobs call it and ask for, what profiles say."""

    posts: tuple[str, ...]
    asks: tuple[str, ...]
    titles: tuple[str, ...]


def _rank(posts: str, asks: str, titles: str) -> Rank:
    return Rank(*(tuple(part.split(", ")) for part in (posts, asks, titles)))


# A job of rank r fits talents of rank r (a move) and r - 1 (a promotion). Nobody advertises rank 0.
RANKS: tuple[Rank, ...] = (
    _rank(
        "doctoral position, PhD studentship",
        "a master's degree is required, suited to recent graduates",
        "PhD student, doctoral candidate, doctoral researcher, graduate student",
    ),
    _rank(
        "postdoctoral position, postdoc, research associate post, postdoctoral fellowship",
        "a doctorate is required, a recent PhD is expected, suited to early-career researchers",
        "postdoctoral researcher, postdoc, research associate, postdoctoral fellow",
    ),
    _rank(
        "lectureship, assistant professorship, junior group leader post, tenure-track position",
        "postdoctoral experience is expected, ready to start a first group, able to teach "
        "undergraduates",
        "lecturer, assistant professor, junior group leader, tenure-track researcher",
    ),
    _rank(
        "senior lectureship, associate professorship, readership, senior group leader post",
        "an established group is expected, experience in supervising doctorates is required, "
        "able to lead a programme",
        "senior lecturer, associate professor, reader, senior group leader",
    ),
    _rank(
        "chair, full professorship, head of department post, directorship",
        "an international reputation is expected, ready to shape a department, experience in "
        "leadership is required",
        "full professor, chair holder, head of department, institute director",
    ),
)

JOB_OPENINGS = (
    "{Institution} invites applications for a {post} in {field}.",
    "We are looking to fill a {post} in {field} at {institution}.",
    "{Post} in {field}, {institution}.",
    "Join {institution}: a {post} in {field} is open.",
    "A {post} is available in the {field} group at {institution}.",
)
JOB_TOPICS = (
    "The work concerns {term}, {term} and {term}.",
    "You will study {term} together with {term}.",
    "Topics include {term}, {term} and {term}.",
    "Of special interest are {term} and {term}.",
    "The group's questions lie in {term}; knowledge of {term} helps.",
)
JOB_PLACES = (
    "The place of work is {city}, {country}.",
    "You would live in {country}.",
    "Our laboratory is in {city}.",
    "Working on site in {city} is expected.",
)
JOB_ASKS = ("{Ask}.", "Requirements: {ask}.", "Please note: {ask}.")
JOB_NOISE = (
    "Informal enquiries are welcome.",
    "The closing date is {n} March.",
    "Salary follows the public scale.",
    "We value diversity and flexible hours.",
    "The contract runs for {n} months.",
    "We have long worked with partners in {other_city}.",
    "Interviews will be held online.",
)

PROFILE_OPENINGS = (
    "{Title} in {field} at {institution}.",
    "I am a {title} at {institution}, working in {field}.",
    "{Title}, {institution}. Area: {field}.",
    "Based in {city}, {country}; {title} in {field}.",
    "{Field} is my home; I work as {title} at {institution}.",
)
PROFILE_SECOND = (
    "Second interest: {field}, above all {term}.",
    "I also move into {field} through {term}.",
    "Lately active in {field} ({term}).",
)
PROFILE_NOISE = (
    "Born in {other_city}.",
    "I spent one summer in {other_city}.",
    "In my spare time I run and bake.",
    "Happy to relocate within the country.",
    "Speaks three languages.",
    "Available from autumn.",
)

# What the judge looks at and the rules do not: a statement is evidence or a phrase. Both speak
# speak of the same terms, so that either tells the field, and they share most words, so that none
# gives it away.
EVIDENCE = (
    "Published {n} papers on {term}, one in {venue}.",
    "Won a {funder} grant of {n}0,000 for {term}.",
    "Released the {term} toolkit that {n} groups use.",
    "Tutored {n} theses on {term} to completion.",
    "Holds {n} patents on {term}.",
    "Results on {term} were replicated by two laboratories.",
    "Led the {funder} project on {term} for {n} years.",
    "Work on {term} is cited {n}00 times.",
    "Invited review of {term} in {venue}.",
    "Shared {term} data, downloaded {n}00 times.",
)
PHRASES = (
    "Passionate about {term} and its future.",
    "Has broad experience with {term} projects.",
    "Interested in publishing papers on {term}.",
    "Works well in groups on {term}.",
    "Familiar with many aspects of {term}.",
    "Keen to win a {funder} grant for {term} one day.",
    "Always eager to learn more about {term}.",
    "Took part in {n} activities around {term}.",
    "Follows the work on {term} in {venue}.",
    "Hopes to share data on {term} and give talks.",
)
VENUES = (
    "Nature",
    "Science",
    "the society's journal",
    "the annual congress",
    "the leading transactions",
)
FUNDERS = ("national", "regional", "foundation", "ministry", "council")
