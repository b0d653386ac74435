"Near duplicates of real photographs: pieces of scikit-learn's two, saved again, cut, or a little brighter."
import pandas as pd, pytest
from fastai.vision.all import PILImage, resnet18, set_seed, vision_learner
from inspect import signature
from pathlib import Path
from sklearn.datasets import load_sample_images
from fastai_jocor.neighbours import near_duplicates

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def duplicates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import duplicates
    return duplicates

def pieces(folder, side=80, step=60):
    "Pieces of two photographs that overlap by a quarter, as files in two folders"
    for name,image in zip(('china','flower'), load_sample_images().images):
        (folder/name).mkdir(parents=True)
        for y in range(0, image.shape[0]-side, step):
            for x in range(0, image.shape[1]-side, step):
                PILImage.create(image[y:y+side,x:x+side]).save(folder/name/f'{y}_{x}.png')
    return folder

def test_copies_are_found(duplicates, tmp_path):
    "By a body with random weights, to which brighter is something else; the pieces overlap"
    duplicates.with_copies(pieces(tmp_path/'all'), tmp_path/'some', n=100, n_copies=20)
    set_seed(0)
    learn = vision_learner(duplicates.loaders_of(tmp_path/'some', 80), resnet18, pretrained=False, path=tmp_path)
    within = signature(near_duplicates).parameters['within'].default
    (_,recall,false), = duplicates.measure(learn, 20, [within])
    assert recall['recompressed'] >= .9 and recall['cut'] >= .5 and len(false) <= 10

def test_figures(duplicates):
    names = [f'a/{o}.jpg' for o in ('0.original','0.cut','0.brighter','1.original')]
    pairs = pd.DataFrame(dict(first=[0,1,0], second=[1,2,3]))
    recall,false = duplicates.figures(pairs, names, n_copies=1)
    assert recall == dict(recompressed=0, cut=1, brighter=0) and false == [(names[0],names[3])]
