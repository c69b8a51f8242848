"""The categories of Open Images that are used, and those that are mapped to others.

In 2021 the first was a list of some 300 names. Here it follows from the annotations: the 300 categories with
the most boxes, and those that COCO has as well. These can depend on the release; to number the categories as
an existing model does, give `category_allow_list_target` a text file with its names, one a line.
"""

from taming.data.helper_types import MostFrequent

COCO_COUNTERPARTS = (  # Open Images' names for COCO's 80 things, in COCO's order
    "Person", "Bicycle", "Car", "Motorcycle", "Airplane", "Bus", "Train", "Truck", "Boat", "Traffic light",
    "Fire hydrant", "Stop sign", "Parking meter", "Bench", "Bird", "Cat", "Dog", "Horse", "Sheep", "Cattle",
    "Elephant", "Bear", "Zebra", "Giraffe", "Backpack", "Umbrella", "Handbag", "Tie", "Suitcase",
    "Flying disc", "Ski", "Snowboard", "Ball", "Kite", "Baseball bat", "Baseball glove", "Skateboard",
    "Surfboard", "Tennis racket", "Bottle", "Wine glass", "Coffee cup", "Fork", "Knife", "Spoon", "Bowl",
    "Banana", "Apple", "Sandwich", "Orange", "Broccoli", "Carrot", "Hot dog", "Pizza", "Doughnut", "Cake",
    "Chair", "Couch", "Houseplant", "Bed", "Kitchen & dining room table", "Toilet", "Television", "Laptop",
    "Computer mouse", "Remote control", "Computer keyboard", "Mobile phone", "Microwave oven", "Oven",
    "Toaster", "Sink", "Refrigerator", "Book", "Clock", "Vase", "Scissors", "Teddy bear", "Hair dryer",
    "Toothbrush",
)

top_300_classes_plus_coco_compatibility = MostFrequent(300, plus=COCO_COUNTERPARTS)

open_images_unify_categories_for_coco = {  # ids, from: to; COCO does not distinguish these
    "/m/03bt1vf": "/m/01g317",  # woman: person
    "/m/04yx4": "/m/01g317",  # man: person
    "/m/05r655": "/m/01g317",  # girl: person
    "/m/01bl7v": "/m/01g317",  # boy: person
    "/m/0cnyhnx": "/m/01xq0k1",  # bull: cattle
    "/m/01226z": "/m/018xm",  # football: ball
    "/m/05ctyq": "/m/018xm",  # tennis ball: ball
    "/m/058qzx": "/m/04ctx",  # kitchen knife: knife
    "/m/06pcq": "/m/0l515",  # submarine sandwich: sandwich
    "/m/03m3pdh": "/m/02crq1",  # sofa bed: couch
    "/m/046dlr": "/m/01x3z",  # alarm clock: clock
    "/m/0h8mzrc": "/m/01x3z",  # wall clock: clock
}
