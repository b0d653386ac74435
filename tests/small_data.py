"Small made-up data in the layout of the real ones, for the tutorials that read files."
import numpy as np, pandas as pd
from pathlib import Path
from PIL import Image

def table(path, n=1500):
    "Rows with the columns of Adult; who works long and has learned long earns more"
    rng = np.random.default_rng(0)
    kinds = {'workclass': ['Private','State-gov','?'], 'education': ['Bachelors','HS-grad'],
             'marital-status': ['Married','Never-married'], 'occupation': ['Sales','Tech-support'],
             'relationship': ['Husband','Wife','Own-child'], 'race': ['White','Black'], 'sex': ['Male','Female']}
    numbers = ['age','fnlwgt','education-num','capital-gain','capital-loss','hours-per-week']
    df = pd.DataFrame({name: rng.normal(40, 10, n).round(2) for name in numbers})
    for name,of in kinds.items(): df[name] = rng.choice(of, n)
    rich = df['education-num'] + df['hours-per-week'] > 90
    df['Salary'] = np.where(rich, '>50K', '<=50K')
    (path/'adult').mkdir(parents=True)
    df.to_csv(path/'adult'/'adult.csv.gz', index=False)

def questions(path, n=320):
    "Lines of TREC, in which the first words tell the class"
    rng = np.random.default_rng(0)
    first = {'HUM:ind': 'Who was', 'LOC:city': 'Where lies', 'NUM:count': 'How many in'}
    other = 'the king river city war of a great old sea book first last star name'.split()
    (path/'trec').mkdir(parents=True)
    for file,size in (('train_5500.label',n), ('TREC_10.label',n//4)):
        kinds = rng.choice(list(first), size)
        lines = [f"{o} {first[o]} {' '.join(rng.choice(other, 5))} ?" for o in kinds]
        (path/'trec'/file).write_text('\n'.join(lines)+'\n', encoding='latin-1')

def photographs(path, n=40):
    "Coloured stripes in folders of three classes, and random weights of a body"
    import timm, torch
    rng = np.random.default_rng(0)
    colors = {'dress': (200,40,40), 'hat': (40,180,60), 'shirt': (40,60,200)}
    for part,size in (('train',n), ('validation',n//4), ('test',n//4)):
        for name,color in colors.items():
            folder = path/'clothing'/part/name
            folder.mkdir(parents=True)
            for i in range(size):
                pixels = rng.normal(color, 30, (48,48,3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder/f'{i:03d}.jpg')
    torch.manual_seed(0)
    body = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    torch.save(body.state_dict(), path/'tf_efficientnet_lite0.pth')

def make(path):
    "All of it"
    for f in (table, questions, photographs): f(Path(path))
    return Path(path)
