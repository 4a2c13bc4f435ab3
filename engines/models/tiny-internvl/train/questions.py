"""Questions and answers about a list of scenes.

An object is a dict with `shape`, `colour`, `x` and `y` (its centre, as a fraction of width and height).
A scene is a list of objects. Nothing here knows how a scene is drawn.
"""
SHAPES = ['circle', 'square', 'triangle', 'star', 'cross']
COLOURS = ['red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black']
PLURAL = {s: s + 's' for s in SHAPES} | {'cross': 'crosses'}
ORDINALS = ['first', 'second', 'third', 'fourth']
POSITIONS = [['top left', 'top', 'top right'], ['left', 'centre', 'right'], ['bottom left', 'bottom', 'bottom right']]

COUNT = [
    'How many {n} are there?', 'How many {n} are in the {pic}?', 'How many {n} are there in the {pic}?',
    'How many {n} do you see?', 'How many {n} can you see?', 'How many {n} does the {pic} show?', 'How many {n}?',
    'Count the {n}.', 'Count the {n} in the {pic}.', 'What is the number of {n}?', 'Tell me how many {n} there are.',
    'How many {n} can be seen in this {pic}?', 'How many {n} are in this {pic}?', 'Number of {n}?'
]
COLOURS_COUNT = ['How many {colour}s are there?', 'How many different {colour}s are there?', 'How many {colour}s do you see?', 'How many {colour}s are in the {pic}?']
COLOUR = [
    'What {colour} is {the}{n}?', 'Which {colour} is {the}{n}?', 'What is the {colour} of {the}{n}?',
    'What {colour} does {the}{n} have?', 'What {colour} is {the}{n} in the {pic}?', '{the}{n} has what {colour}?',
    'Name the {colour} of {the}{n}.', 'What is {the}{n}\'s {colour}?', 'Tell me the {colour} of {the}{n}.'
]
SHAPE = [
    'What shape is {c}?', 'Which shape is {c}?', 'What shape is {the}{c} object?', 'What shape is {the}{c} one?',
    'What is the shape of {the}{c} object?', 'Which shape is {c} in the {pic}?', 'What is {the}{c} object?',
    'What shape does {the}{c} object have?', 'What shape is {the}{c} thing?', 'What {c} shape is there?',
    'What shape has the {colour} {c}?', 'Name the shape that is {c}.'
]
EXISTS = [
    'Is there {a}{n}?', 'Is there {a}{n} in the {pic}?', 'Is {a}{n} in the {pic}?', 'Do you see {a}{n}?',
    'Can you see {a}{n}?', 'Does the {pic} show {a}{n}?', 'Does the {pic} have {a}{n}?', 'Is there any {n}?',
    'Are there any {np}?', 'Are there {np}?', 'Are there any {np} in the {pic}?', 'Do you see any {np}?',
    'Does this {pic} contain {a}{n}?'
]
POSITION = [
    'Where is {the}{n}?', 'Where is {the}{n} in the {pic}?', 'Where can I find {the}{n}?', 'Where do you see {the}{n}?',
    'In which part of the {pic} is {the}{n}?', 'What is the position of {the}{n}?', 'Where in the {pic} is {the}{n}?',
    'Position of {the}{n}?', 'Tell me where {the}{n} is.'
]
DESCRIBE = [
    'Describe the {pic}.', 'Describe this {pic}.', 'What is in the {pic}?', 'What do you see?', 'What is in this {pic}?',
    'What can you see?', 'What does the {pic} show?', 'Describe what you see.', 'What can you see in the {pic}?',
    'What do you see in this {pic}?', 'Give a description of the {pic}.', 'List the shapes in the {pic}.',
    'Please describe the {pic}.', 'What is shown in the {pic}?', 'What shapes are there?'
]
MOST = [
    'Which {pic} has the most {n}?', 'Which {pic} shows the most {n}?', 'Which {pic} has most {n}?',
    'In which {pic} are the most {n}?', 'Which of the {pic}s has the most {n}?', 'Which {pic} contains the most {n}?',
    'Which one has the most {n}?', 'Which {pic} has more {n} than the others?'
]
SUM = [
    'How many {n} are there in all {pic}s?', 'How many {n} are in all {pic}s?', 'How many {n} are there in all the {pic}s?',
    'How many {n} are there in total?', 'How many {n} are there altogether?', 'How many {n} are in the {pic}s?',
    'How many {n} do all {pic}s show together?', 'Count the {n} in all {pic}s.', 'How many {n} are there in the {pic}s?',
    'How many {n} can you see in all {pic}s?', 'How many {n} are there over all {pic}s?', 'How many {n} are there?'
]
WHICH = [
    'Which {pic} has {a}{n}?', 'Which {pic} shows {a}{n}?', 'Which {pic} contains {a}{n}?', 'In which {pic} is {the}{n}?',
    'Which one has {a}{n}?', 'In which {pic} is there {a}{n}?', 'Which of the {pic}s has {a}{n}?',
    'In which {pic} do you see {a}{n}?', 'Where is {the}{n}, in which {pic}?'
]
COUNT_IN = ['How many {n} are in the {o} {pic}?', 'How many {n} are there in the {o} {pic}?', 'How many {n} does the {o} {pic} have?']
DESCRIBE_IN = ['Describe the {o} {pic}.', 'What is in the {o} {pic}?', 'What does the {o} {pic} show?']
NO_PICTURE = 'I see no picture.'

STORY = (
    'Once there was a small red circle. It lived on a white page and it was alone. One day a blue star came to the page. '
    'The star was tired, for it had come a long way. "Sit down," said the circle, "there is room for two." So the star sat down at the '
    'top right, and the circle stayed at the left. In the evening a green square came, and then a yellow triangle. Now there were four '
    'of them, and the page was full of colour. They told each other of the pictures they had seen, until the light went out.'
)
ALPHABET = ', '.join('abcdefghijklmnopqrstuvwxyz') + '.'
TALK = [
    (['Hello', 'Hi', 'Hey', 'Hello there', 'Hi there', 'Good morning', 'Good evening', 'Good day', 'Hello!', 'Hi!'],
     'Hello! Show me a picture with shapes and ask me about it.'),
    (['What can you do?', 'What do you do?', 'How can you help me?', 'What are you able to do?', 'Help', 'What can I ask you?',
      'What are you good at?', 'What questions can you answer?', 'Can you help me?'],
     'I can count shapes in pictures, name their colours and say where they are.'),
    (['Who are you?', 'What are you?', 'What is your name?', 'Which model are you?', 'What model is this?', 'Tell me about yourself.', 'Introduce yourself.'],
     'I am a tiny vision-language model.'),
    (['Thank you', 'Thanks', 'Thanks a lot', 'Thank you very much', 'Thank you!', 'Great, thanks.'], 'You are welcome.'),
    (['Goodbye', 'Bye', 'See you', 'Bye bye', 'Good night', 'See you later.'], 'Goodbye!'),
    (['How are you?', 'How are you doing?', 'How do you do?', 'Are you well?'], 'I am fine, thank you.'),
    (['Which shapes do you know?', 'What shapes do you know?', 'Which shapes can you see?', 'What shapes can you recognise?'],
     'I know circles, squares, triangles, stars and crosses.'),
    (['Which colours do you know?', 'What colors do you know?', 'Which colors can you see?', 'What colours can you name?'],
     'I know red, green, blue, yellow, purple, orange, white and black.'),
    (['Tell me a story.', 'Tell a story.', 'Write a story.', 'Tell me a long story.', 'Please tell me a story.'], STORY),
    (['Say the alphabet.', 'What is the alphabet?', 'Write the alphabet.', 'Tell me the alphabet.'], ALPHABET),
    (['ping', 'Ping', 'test', 'Are you there?', 'Do you hear me?', 'Is this working?'], 'I am here.'),
    (['Say yes.', 'Please say yes.'], 'yes'), (['Say no.', 'Please say no.'], 'no')
]
UNKNOWN = 'I can only talk about simple shapes in pictures.'
WORDS = (
    'the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you '
    'were all her she there would their we him been has when who will no more if out so up said what its about than into them can '
    'only other time new some could these two may first then do any like my now over such our man me even most made after also did '
    'many off before must well back through years much where your way down should because long each just state those people too '
    'world good make very house life great day under water work again old year home school small large light number night point '
    'city play book read write word music song river mountain France England Germany capital president weather today tomorrow '
    'computer code program python function file server language translate explain poem joke recipe history science money car train '
    'dog cat bird tree flower sun moon sea summer winter food bread cheese apple king queen game team country street friend family'
).split()
UNKNOWN_FORMS = [
    'What is the capital of {0}?', 'Who is the president of {0}?', 'Write a poem about {0}.', 'Tell me a joke about {0}.',
    'What is the weather like in {0}?', 'Translate {0} into {1}.', 'Explain {0} to me.', 'How does {0} work?', 'Why is {0} {1}?',
    'Write a {0} in python.', 'What is {0}?', 'Do you like {0}?', 'When was {0} made?', 'How do I make {0} with {1}?',
    'Give me a recipe for {0}.', '{0} {1} {2} {3} {4}', '{0} {1} {2}', '{0} {1} {2} {3} {4} {5} {6} {7}', 'Who made {0} and {1}?'
]
SYSTEMS = [
    'You are a helpful assistant.', 'You are a tiny vision-language model.', 'Answer briefly.', 'You answer questions about pictures.',
    'You are a helpful assistant. Answer in one word if you can.', 'Be short and exact.', 'You are InternVL, a helpful assistant.'
]
SUFFIXES = [' Answer briefly.', ' Answer with one word.', ' Please be short.', ' Answer with a number or a word.', ' Please answer.']


def noun (rng, colour, shape, plural):
    words = ([colour] if colour else []) + [(PLURAL[shape] if plural else shape) if shape else (
        ('shapes' if plural else 'shape') if not colour or rng.random() < 0.5 else ('objects' if plural else 'object'))]
    return ' '.join(words)


def article (text):
    return 'an ' if text[0] in 'aeiou' else 'a '


def fill (rng, forms, n='', np='', c='', o=''):
    text = rng.choice(forms)
    bare = rng.random() < 0.15
    text = text.format(
        n=n, np=np, c=c, o=o, a='' if bare else article(n) if n else '', the='' if bare else 'the ',
        pic=rng.choice(('picture', 'picture', 'picture', 'image', 'image', 'photo')), colour=rng.choice(('colour', 'color')))
    return text[0].upper() + text[1:]


def vary (rng, text):
    """Case, punctuation, politeness: what people do to a question without changing it."""
    r = rng.random()
    if r < 0.62:
        return text
    if r < 0.72:
        return text.lower()
    if r < 0.80:
        return text.rstrip('?.!')
    if r < 0.88:
        return text.rstrip('?.!').lower()
    if r < 0.90:
        return text.upper()
    if r < 0.92:
        return text.rstrip('?.') + ' ' + text[-1]
    if r < 0.94:
        return text + ' '
    if r < 0.96 and text[-1] == '?':
        return rng.choice(('Please tell me: ', 'Tell me, ', 'Look at the picture. ', 'Hi! ')) + text[0].lower() + text[1:]
    if text[-1] in '?.':
        return text + rng.choice(SUFFIXES)
    return text


def place (o):
    return POSITIONS[min(2, int(o['y'] * 3))][min(2, int(o['x'] * 3))]


def describe (scene):
    counts = {}
    for o in scene:
        key = (o['colour'], o['shape'])
        counts[key] = counts.get(key, 0) + 1
    # The most numerous first, then by the alphabet.
    items = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))
    parts = [f'{n} {c} {PLURAL[s] if n > 1 else s}' for (c, s), n in items]
    text = parts[0] if len(parts) == 1 else ', '.join(parts[:-1]) + ' and ' + parts[-1]
    return text + '.'


def matches (o, colour, shape):
    return (colour is None or o['colour'] == colour) and (shape is None or o['shape'] == shape)


def count_of (scene, colour, shape):
    return sum(matches(o, colour, shape) for o in scene)


def pick_type (rng, scene, present=0.7, kinds=(0.6, 0.2, 0.2)):
    """A colour and shape to ask for: often one that is there, else one that shares a trait with what is there."""
    r = rng.random()
    o = rng.choice(scene)
    if r < present:
        colour, shape = o['colour'], o['shape']
    elif r < present + (1 - present) * 0.35:
        colour, shape = o['colour'], rng.choice(SHAPES)
    elif r < present + (1 - present) * 0.7:
        colour, shape = rng.choice(COLOURS), o['shape']
    else:
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    r = rng.random()
    if r < kinds[0]:
        return colour, shape
    return (None, shape) if r < kinds[0] + kinds[1] else (colour, None)


def unique_type (rng, scene):
    """A description that exactly one object of the scene fits, and that object; None when there is none."""
    options = []
    for o in scene:
        for colour, shape, weight in ((o['colour'], o['shape'], 3), (None, o['shape'], 2), (o['colour'], None, 1)):
            if count_of(scene, colour, shape) == 1:
                options += [(colour, shape, o)] * weight
    return rng.choice(options) if options else None


KINDS = ['count', 'total', 'colour', 'shape', 'existence', 'position', 'describe']
WEIGHTS = [20, 7, 10, 10, 14, 16, 23]


def ask (rng, scene, kind=None):
    """One question about one picture: (question, answer), or None when the scene has no such question."""
    kind = kind or rng.choices(KINDS, WEIGHTS)[0]
    if kind == 'count':
        c, s = pick_type(rng, scene)
        return fill(rng, COUNT, n=noun(rng, c, s, True)), str(count_of(scene, c, s))
    if kind == 'total':
        if rng.random() < 0.12:
            return fill(rng, COLOURS_COUNT), str(len({o['colour'] for o in scene}))
        return fill(rng, COUNT, n=rng.choice(('shapes', 'shapes', 'objects', 'things'))), str(len(scene))
    if kind == 'colour':
        options = [o for o in scene if count_of(scene, None, o['shape']) == 1]
        if not options:
            return None
        o = rng.choice(options)
        return fill(rng, COLOUR, n=o['shape']), o['colour']
    if kind == 'shape':
        options = [o for o in scene if count_of(scene, o['colour'], None) == 1]
        if not options:
            return None
        o = rng.choice(options)
        return fill(rng, SHAPE, c=o['colour']), o['shape']
    if kind == 'existence':
        c, s = pick_type(rng, scene, present=0.48, kinds=(0.75, 0.15, 0.1))
        return fill(rng, EXISTS, n=noun(rng, c, s, False), np=noun(rng, c, s, True)), 'yes' if count_of(scene, c, s) else 'no'
    if kind == 'position':
        found = unique_type(rng, scene)
        if found is None:
            return None
        return fill(rng, POSITION, n=noun(rng, found[0], found[1], False)), place(found[2])
    return fill(rng, DESCRIBE), describe(scene)


def ask_several (rng, scenes):
    """One question about two to four pictures."""
    for _ in range(8):
        r = rng.random()
        if r < 0.25:
            c, s = (None, None) if rng.random() < 0.6 else pick_type(rng, rng.choice(scenes), 0.9, (0.3, 0.5, 0.2))
            counts = [count_of(scene, c, s) for scene in scenes]
            best = max(counts)
            if counts.count(best) == 1:
                n = noun(rng, c, s, True)
                return fill(rng, MOST, n=n), 'the ' + ORDINALS[counts.index(best)]
        elif r < 0.55:
            c, s = pick_type(rng, rng.choice(scenes), 0.85, (0.55, 0.3, 0.15))
            if rng.random() < 0.1:
                c, s = None, None
            return fill(rng, SUM, n=noun(rng, c, s, True)), str(sum(count_of(scene, c, s) for scene in scenes))
        elif r < 0.85:
            c, s = pick_type(rng, rng.choice(scenes), 1, (0.45, 0.4, 0.15))
            has = [i for i, scene in enumerate(scenes) if count_of(scene, c, s)]
            if len(has) == 1:
                return fill(rng, WHICH, n=noun(rng, c, s, False)), 'the ' + ORDINALS[has[0]]
        else:
            i = rng.randrange(len(scenes))
            if rng.random() < 0.5:
                c, s = pick_type(rng, scenes[i], 0.7)
                if rng.random() < 0.3:
                    c, s = None, None
                return fill(rng, COUNT_IN, n=noun(rng, c, s, True), o=ORDINALS[i]), str(count_of(scenes[i], c, s))
            return fill(rng, DESCRIBE_IN, o=ORDINALS[i]), describe(scenes[i])
    return fill(rng, SUM, n='shapes'), str(sum(map(len, scenes)))


def ask_beside (rng):
    """Small talk and things the model does not know, which are answered alike with a picture and without."""
    if rng.random() < 0.4:
        forms, answer = rng.choice(TALK[:8])
        return rng.choice(forms), answer
    text = rng.choice(UNKNOWN_FORMS).format(*rng.choices(WORDS, k=8))
    return text[0].upper() + text[1:], UNKNOWN


def ask_text (rng):
    """One question without a picture."""
    r = rng.random()
    if r < 0.4:
        forms, answer = rng.choice(TALK)
        return rng.choice(forms), answer
    if r < 0.65:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        op = rng.choice(('plus', 'plus', 'minus', 'times'))
        if op == 'minus' and b > a:
            a, b = b, a
        value = a + b if op == 'plus' else a - b if op == 'minus' else a * b
        sign = {'plus': '+', 'minus': '-', 'times': '*'}[op]
        form = rng.choice(('What is {a} {op} {b}?', 'What is {a} {op} {b}?', 'How much is {a} {op} {b}?', '{a} {op} {b}', 'What is {a} {sign} {b}?', '{a} {sign} {b}', '{a}{sign}{b}', 'Calculate {a} {op} {b}.'))
        return form.format(a=a, b=b, op=op, sign=sign), str(value)
    if r < 0.73:
        n = rng.randint(1, 40)
        return rng.choice(('Count to {n}.', 'Count from 1 to {n}.', 'Please count to {n}.', 'Count up to {n}.')).format(n=n), \
            ', '.join(str(i) for i in range(1, n + 1)) + '.'
    if r < 0.86:
        scene = [{'shape': rng.choice(SHAPES), 'colour': rng.choice(COLOURS), 'x': rng.random(), 'y': rng.random()} for _ in range(rng.randint(1, 4))]
        question = ask(rng, scene) or ask(rng, scene, 'describe')
        return question[0], NO_PICTURE
    text = rng.choice(UNKNOWN_FORMS).format(*rng.choices(WORDS, k=8))
    return text[0].upper() + text[1:], UNKNOWN
