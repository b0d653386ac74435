"Data of all kinds in an audit: several inputs, numbers that are missing, few validation labels, features on disk."
import threading, time, warnings, numpy as np, pandas as pd, pytest, torch
from fastai.data.all import (CategoryBlock, ColReader, DataBlock, DataLoader, DataLoaders, RandomSplitter,
    TransformBlock)
from fastai.tabular.all import Normalize, TabularPandas, tabular_learner
from fastai.vision.all import (CrossEntropyLossFlat, get_image_files, ImageBlock, Learner, Module, nn, parent_label,
    Path, PILImage, Resize, resnet18, set_seed, tensor, vision_learner)
from sklearn.datasets import load_digits, load_wine
from fastai_jocor import features
from fastai_jocor.all import audit_labels, feature_dls, InstanceDependent, jocor_mlp
from fastai_jocor.features import body_of, in_order, kept_features
from fastai_jocor.neighbours import near_duplicates, nearest
from learners import quiet
from pictures import digit_files

# --- several inputs

class TwoInputs(Module):
    def __init__(self): self.emb,self.lin = nn.Embedding(4, 4),nn.Linear(8, 4)
    def forward(self, a, shop): return self.lin(torch.cat([a.float(), self.emb(shop)], -1))

def test_an_audit_of_a_model_with_two_inputs():
    "The second one is a category, too"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 600)
    x = (np.eye(4)[y]*4+rng.normal(size=(600,4))).astype(np.float32)
    df = pd.DataFrame(dict(i=range(600), shop=rng.choice(list('stuv'), 600), y=y))
    blocks = TransformBlock(type_tfms=lambda i: tensor(x[i])), CategoryBlock, CategoryBlock
    block = DataBlock(blocks, n_inp=2, getters=[ColReader('i'), ColReader('shop'), ColReader('y')],
                      splitter=RandomSplitter(seed=0))
    learn = quiet(Learner(block.dataloaders(df, bs=64), TwoInputs(), loss_func=CrossEntropyLossFlat()))
    audit = audit_labels(learn, progress=False)
    assert (audit.table.given_label == df.y[audit.table['item']].astype(str).to_numpy()).all() and audit.learned

# --- missing numbers

def test_an_item_with_a_missing_number_is_not_judged():
    wine = load_wine(as_frame=True)
    df = wine.data.assign(kind=wine.target)
    df.loc[3,'ash'] = np.nan
    to = TabularPandas(df, [Normalize], cont_names=list(wine.data), y_names='kind', y_block=CategoryBlock(),
                       splits=RandomSplitter(seed=0)(df))
    learn = quiet(tabular_learner(to.dataloaders(bs=16), layers=[32]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        audit = audit_labels(learn, progress=False)
    told = [str(o.message) for o in said if 'NaN' in str(o.message)]
    assert len(told) == 2 # once in training, and once for the audit
    assert 'items have NaN or infinite numbers, such as 3' in told[1]
    t = audit.table.set_index('item')
    assert np.isnan(t.p_wrong[3]) and t.p_wrong.notna().sum() == len(df)-1 and audit.expected_wrong()['n'] == len(df)-1

class SomeNaN(Module):
    "A body whose features are NaN for dark pictures"
    def __init__(self): self.conv = nn.Conv2d(3, 16, 3)
    def forward(self, x):
        out = self.conv(x)
        return torch.where(x.mean((1,2,3), keepdim=True) < self.conv.bias.sum()*0, torch.nan, out)

def test_features_that_are_not_finite(tmp_path):
    learn = pictures_of(digit_files(tmp_path/'p', 200))
    body = SomeNaN()
    means = torch.cat([x.mean((1,2,3)) for x, in in_order(learn.dls.train, progress=False)])
    learn.model[0] = nn.Sequential(Shift(means.sort()[0][3:5].mean()), body)
    learn.model[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    dls = feature_dls(learn, tmp_path/'f', progress=False)
    bad = dls.train.dataset.x.isnan().any(1)
    assert bad.sum() == 4 and (bad == (means < means.sort()[0][3:5].mean())).all()
    with pytest.warns(UserWarning, match='4 of the .* items have NaN'): audit = audit_labels(learn, progress=False)
    t = audit.table[audit.table.part == 'train']
    assert (t.p_wrong.isna() == bad.numpy()).all()

class Shift(Module):
    def __init__(self, by): self.by = by
    def forward(self, x): return x-self.by

def test_noise_by_inputs_refuses_missing_numbers():
    x = np.random.default_rng(0).normal(size=(50,3))
    x[7,1] = np.nan
    with pytest.raises(ValueError, match='holds NaN or infinite numbers: fill them in first'):
        InstanceDependent(.9).corrupt([0,1]*25, 2, items=list(x))

def test_noise_by_inputs_of_rows_with_flags():
    "As `FillMissing` makes them: numbers and truth values in one row"
    rows = [pd.Series([float(i), i % 3 == 0], dtype=object) for i in range(50)]
    noisy = InstanceDependent(.5).corrupt([0,1]*25, 2, items=rows)
    plain = InstanceDependent(.5).corrupt([0,1]*25, 2, items=[r.to_numpy(float) for r in rows])
    assert (noisy == plain).all() and (noisy != [0,1]*25).any()

# --- few validation labels

def test_a_small_validation_set_with_many_wrong_labels():
    d,rng = load_digits(),np.random.default_rng(0)
    order = rng.permutation(len(d.target))
    y,valid = d.target[order].copy(),np.arange(len(order)) >= 1697
    wrong = valid & (rng.random(len(y)) < .6)
    y[wrong] = (y[wrong]+rng.integers(1, 10, wrong.sum())) % 10
    items = list(zip(torch.tensor(d.data[order]/16).float(), torch.tensor(y)))
    dls = DataLoaders(DataLoader(items[:1697], bs=64, shuffle=True), DataLoader(items[1697:], bs=64))
    learn = quiet(Learner(dls, jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat()))
    audit = audit_labels(learn, progress=False, seed=0)
    e,listed = audit.expected_wrong('valid'),audit.suspects(part='valid').position+1697
    assert e['low'] <= e['expected'] <= e['high'] and abs(e['expected']-wrong.sum()) < 15
    assert wrong[listed].mean() > .7 and wrong[listed].sum() > .6*wrong.sum()

# --- copies

@pytest.mark.parametrize('n', (50, 200, 300, 400))
def test_copies_are_found_however_many(n):
    x = np.random.default_rng(0).normal(size=(400,64)).astype(np.float32)*100
    pairs = near_duplicates(*nearest(np.concatenate([x, x[:n]])))
    assert {(i, 400+i) for i in range(n)} <= set(zip(pairs['first'], pairs['second'])) and len(pairs) < 1.2*n+1
    assert (pairs.distance[:n] == 0).all()

# --- features on disk

def pictures_of(files, **kwargs):
    set_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: get_image_files(p).sorted(),
                      get_y=parent_label, splitter=RandomSplitter(seed=0), **dict(item_tfms=Resize(32)) | kwargs)
    return quiet(vision_learner(block.dataloaders(files, bs=16, num_workers=0), resnet18, pretrained=False,
                                normalize=False))

class Cropped:
    "A part of a picture; its size is not in its name"
    def __init__(self, size): self.size = size
    def __repr__(self): return 'Cropped'
    def __call__(self, file): return PILImage.create(PILImage.create(file).crop((0, 0, self.size, self.size)))

def test_features_of_pictures_that_are_opened_in_another_way(tmp_path):
    files = digit_files(tmp_path/'p', 120)
    x = [feature_dls(pictures_of(files, get_x=Cropped(8)), tmp_path/'f', progress=False).train.dataset.x]
    with pytest.warns(UserWarning, match='holds other features than those of these items now'):
        for o in 'fg':
            dls = feature_dls(pictures_of(files, get_x=Cropped(3)), tmp_path/o, progress=False)
            x.append(dls.train.dataset.x)
    torch.testing.assert_close(x[1], x[2])
    assert not torch.allclose(x[0], x[1], atol=1e-2)

def test_features_of_the_files_that_are_read(tmp_path):
    "The items name one file, and `get_x` reads another"
    files = digit_files(tmp_path/'p', 60)
    for at,size in (('a',8), ('b',4)):
        for f in get_image_files(files):
            to = tmp_path/at/f.name
            to.parent.mkdir(exist_ok=True)
            PILImage.create(f).crop((0, 0, size, size)).save(to)
    keys = [features.feature_key(body_of(l.model), l.dls.train) for l in
            [pictures_of(files, get_x=lambda f, at=at: tmp_path/at/f.name) for at in 'ab']]
    assert keys[0] != keys[1]

def test_two_first_passes_at_once(tmp_path, monkeypatch):
    "The second waits, and reads what the first has written"
    learn = pictures_of(digit_files(tmp_path/'p', 200))
    body,dl,read,found,passes = body_of(learn.model).eval(),learn.dls.train,features.read_features,[],[]
    def slowly(body, dl, idxs, *args):
        passes.append(len(idxs))
        for o in read(body, dl, idxs, *args):
            time.sleep(.1)
            yield o
    monkeypatch.setattr(features, 'read_features', slowly)
    def go(): found.append(np.array(kept_features(body, dl, tmp_path/'f', 16, False)))
    threads = [threading.Thread(target=go) for _ in range(2)]
    for t in threads:
        t.start()
        time.sleep(.35)
    for t in threads: t.join()
    assert len(found) == 2 and sorted(passes) == [8, len(dl.dataset)]
    np.testing.assert_array_equal(*found)
    assert (found[0] != 0).any(1).all()
