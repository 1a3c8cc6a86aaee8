"""Does a model of OpenMoji understand what it was never told so? Known captions beside others for the same things.

    python experiments/unseen_phrasings.py --model MODEL               # prints; -o writes JSON

The hundred phrasings below were written down before the model had drawn any of them, and none is a caption of the data.
What counts is the rank of the emoji that is meant among all 1,918, by features of the picture; both ways of saying it
are drawn from the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import Pipeline, hub
from ldm.data import CaptionedImages, DataConfig, split, to_signed
from ldm.data.layouts import open_source
from ldm.evaluation.features import feature_space
from ldm.evaluation.images import generate_images
from ldm.evaluation.prompt_alignment import RetrievalGallery, retrieval
from ldm.report.text import retrieval_lines

PHRASINGS = {
    "dog face": "a happy canine",
    "cat face": "the head of a kitten",
    "pig face": "a piglet's head",
    "rabbit face": "the face of a bunny",
    "panda": "a black and white bear from China",
    "fox": "a sly red woodland animal",
    "lion": "the king of the savanna with a mane",
    "frog": "a green toad",
    "elephant": "a grey animal with a trunk",
    "whale": "a huge sea mammal",
    "shark": "a dangerous fish with sharp teeth",
    "octopus": "a sea creature with eight arms",
    "butterfly": "an insect with pretty wings",
    "honeybee": "an insect that makes honey",
    "snail": "a slow animal that carries its shell",
    "turtle": "a tortoise",
    "penguin": "a bird of the antarctic that cannot fly",
    "owl": "a bird that hunts at night",
    "duck": "a mallard swimming",
    "horse face": "the head of a pony",
    "red apple": "a ripe red fruit from the orchard",
    "green apple": "an unripe sour fruit, green",
    "banana": "a long yellow tropical fruit",
    "strawberry": "a sweet red berry",
    "grapes": "what wine is made of",
    "watermelon": "a slice of a big juicy melon",
    "lemon": "a sour yellow citrus fruit",
    "carrot": "an orange root that rabbits love",
    "tomato": "a round red vegetable for ketchup",
    "pizza": "a slice of italian food with cheese and salami",
    "hamburger": "a beef patty in a bun",
    "french fries": "fried potato sticks in a red box",
    "doughnut": "a fried ring with icing",
    "cookie": "a biscuit with chocolate chips",
    "ice cream": "a scoop of gelato in a bowl",
    "birthday cake": "a party cake with candles on it",
    "hot beverage": "a steaming cup of espresso",
    "beer mug": "a pint of lager",
    "wine glass": "a glass of merlot",
    "egg": "what a hen lays",
    "automobile": "a small red vehicle",
    "sport utility vehicle": "a blue family vehicle",
    "bus": "public transport on the road",
    "taxi": "a yellow cab",
    "fire engine": "a red truck of the firemen",
    "ambulance": "a vehicle that drives patients to the hospital",
    "bicycle": "two wheels and pedals",
    "airplane": "a jet in the sky",
    "rocket": "a spaceship taking off",
    "sailboat": "a yacht on the water",
    "ship": "a big vessel at sea",
    "locomotive": "an old engine driven by coal and steam",
    "tractor": "a farm machine",
    "house": "a family home",
    "hospital": "a clinic",
    "school": "a place where children learn",
    "church": "a chapel with a cross",
    "castle": "a medieval fortress",
    "tent": "a shelter for camping",
    "alarm clock": "it wakes you up in the morning",
    "watch": "a timepiece for the wrist",
    "hourglass done": "sand running through glass",
    "umbrella": "protection from rain",
    "key": "it opens a door",
    "locked": "a closed padlock",
    "bell": "it rings",
    "light bulb": "an electric lamp, a bright idea",
    "candle": "wax with a burning wick",
    "hammer": "a tool to drive nails",
    "scissors": "a tool for cutting paper",
    "pencil": "something to draw with",
    "camera": "it takes photographs",
    "television": "a screen to watch films on",
    "laptop": "a portable macbook",
    "mobile phone": "a smartphone",
    "guitar": "an instrument with six strings",
    "drum": "an instrument to beat with sticks",
    "violin": "a fiddle",
    "soccer ball": "a black and white ball to kick",
    "basketball": "an orange ball to throw into a hoop",
    "trophy": "a golden cup for the winner",
    "evergreen tree": "a fir in the forest",
    "deciduous tree": "an oak in summer",
    "palm tree": "a coconut plant on a beach",
    "cactus": "a prickly plant of the desert",
    "sunflower": "a big yellow bloom",
    "tulip": "a spring flower from holland",
    "rose": "a romantic red flower",
    "sun": "our star shining brightly",
    "crescent moon": "a thin lunar sickle",
    "snowman": "a man made of snow",
    "fire": "hot burning flames",
    "rainbow": "an arc of many colours in the sky",
    "red heart": "a symbol of love",
    "blue heart": "a symbol of love, blue",
    "smiling face with sunglasses": "a cool guy in shades",
    "crying face": "a sad person with a tear",
    "angry face": "somebody who is mad",
    "sleeping face": "someone who is snoozing",
    "crown": "what a king wears on his head",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/openmoji-64/pipeline")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    try:
        pipeline = Pipeline.from_pretrained(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    prompts = {"names": list(PHRASINGS), "unseen phrasings": list(PHRASINGS.values())}
    settings = {"seed": arguments.seed, "num_inference_steps": arguments.steps, "batch_size": 20}
    pictures = {kind: generate_images(pipeline, texts, **settings) for kind, texts in prompts.items()}
    config = DataConfig(path="openmoji", resolution=pictures["names"].shape[-1])
    sides = split(open_source(config).samples, config.held_out)
    space = feature_space(device=pipeline.unet.conv_in.weight.device)
    gallery = RetrievalGallery.from_images([CaptionedImages(side, config, 0) for side in sides], space)
    matches, found = gallery.matches(prompts["names"]), {}
    for kind, images in pictures.items():
        features = space.compute(to_signed(chunk) for chunk in images.split(20))
        found[kind] = retrieval(features, gallery.features, matches, seed=arguments.seed)
        print("\n".join([kind, *retrieval_lines(found[kind], space.label())]))
    if arguments.output is not None:
        hub.write_json(arguments.output, {kind: ranks.to_dict() for kind, ranks in found.items()})


if __name__ == "__main__":
    main()
