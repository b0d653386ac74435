"Label noise in a DataBlock, in tables and in text: a label belongs to its item; what show_flipped shows."
import pickle, subprocess, sys, numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt
from pathlib import Path
from fastai.text.all import TextBlock
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner
from fastai.vision.all import (ColReader, DataBlock, ImageBlock, IndexSplitter, Learner, PILImage, TransformBlock,
    get_image_files, load_learner, nn, parent_label, warnings)
from fastai_jocor.noise import *
from fastai_jocor.instance import InstanceDependent
from fastai_jocor.blocks import *
from fastai_jocor.blocks import _ItemNote

def frame(n=240): return pd.DataFrame(dict(x=range(n), y=['cat','dog','owl']*(n//3)))

def frame_block(noise=Symmetric(.5), seed=3):
    return DataBlock((TransformBlock, NoisyCategoryBlock(noise, seed)), get_x=ColReader('x'), get_y=ColReader('y'),
                     splitter=IndexSplitter(range(200,240)))

def item_block(noise, get_y, held_out=(0,), **kwargs):
    labels = NoisyCategoryBlock(noise, **kwargs)
    return DataBlock((TransformBlock, labels), get_y=get_y, splitter=IndexSplitter(held_out))

def pair_block(noise, seed=0, held_out=(0,)):
    return DataBlock((TransformBlock, NoisyCategoryBlock(noise, seed)), get_x=lambda o: o[0], get_y=lambda o: o[1],
                     splitter=IndexSplitter(held_out))

def given_labels(ds): return [int(o) for o in ds.train.tls[1]]

def loaded(learn, f):
    learn.export(f)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(f)

# --- a label belongs to its item

@pytest.mark.parametrize('workers', (0,2))
def test_a_label_is_the_same_in_every_epoch_and_worker(workers):
    df = frame()
    dls = frame_block().dataloaders(df, bs=16, num_workers=workers, drop_last=False)
    def labels(dl): return {int(x): int(y) for b in dl for x,y in zip(*b)}
    first = labels(dls.train)
    assert first == dict(enumerate(dls.noise.noisy.tolist())) == labels(dls.train)
    assert labels(dls.train.new(shuffle=False)) == first
    truth = [dls.vocab.o2i[y] for y in df.y]
    assert labels(dls.valid) == dict(zip(range(200,240), truth[200:]))
    assert dls.noise.true.tolist() == truth[:200]
    assert .35 < dls.noise.rate < .65 and (dls.noise.flipped == (dls.noise.true != dls.noise.noisy)).all()

def test_integer_and_string_labels_flip_alike():
    df = frame()
    coded = df.assign(y=df.y.map(dict(cat=0, dog=1, owl=2)))
    assert (frame_block().datasets(df).noise.noisy == frame_block().datasets(coded).noise.noisy).all()

def test_pairs_of_array_and_label_flip_alike_however_labels_are_coded():
    x,y = np.random.RandomState(0).rand(90,4),np.arange(90)%3
    def noisy(labels, xs=x):
        return pair_block('symmetric:0.5', 1, range(80,90)).datasets([list(o) for o in zip(xs, labels)])
    a,b = noisy(y),noisy(np.array(['cat','dog','owl'])[y])
    assert (a.noise.noisy == b.noise.noisy).all() and a.noise.flipped.any()
    for o in (a, b, noisy(y, np.repeat(x[:30], 3, axis=0))): assert given_labels(o) == o.noise.noisy.tolist()

def test_a_row_keeps_its_label_when_rows_are_shuffled():
    df = frame()
    a = frame_block().datasets(df)
    mixed = df[:200].sample(frac=1, random_state=1)
    b = frame_block().datasets(pd.concat([mixed, df[200:]]))
    assert dict(zip(mixed.index, b.noise.noisy)) == dict(zip(range(200), a.noise.noisy))

def test_items_that_are_tensors_keep_their_labels_in_another_process():
    import cloudpickle
    torch.manual_seed(0)
    x = torch.randn(60,4)
    ds = item_block(Symmetric(.5), lambda o: int(o[0]>0), range(50,60), seed=1).datasets(list(x))
    given = given_labels(ds)
    assert given == ds.noise.noisy.tolist() and ds.noise.flipped.any()
    assert given_labels(pickle.loads(cloudpickle.dumps(ds))) == given
    code = ("import torch; from fastai_jocor.blocks import item_key; torch.manual_seed(0); "
            "print(item_key(torch.randn(60,4)[7]), item_key(('xy','x'+'y')))")
    out = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True).stdout.split()
    assert out == [item_key(x[7]), item_key(('xy','xy'))]

def test_after_load_learner_test_items_keep_their_labels(tmp_path):
    dls = frame_block(Symmetric(1.)).dataloaders(frame(), bs=16, num_workers=0)
    learn = loaded(Learner(dls, nn.Sequential(nn.Embedding(240,3)), path=tmp_path), tmp_path/'export.pkl')
    test = learn.dls.test_dl(frame()[:9], with_labels=True)
    assert [int(o) for o in test.dataset.tls[1]] == [0,1,2]*3
    assert learn.dls.noise.rate == 1.

def test_a_block_used_twice_keeps_its_records_apart():
    block = frame_block()
    a = block.datasets(frame())
    given = given_labels(a)
    b = block.datasets(frame()[::-1].reset_index(drop=True))
    assert given_labels(a) == given == a.noise.noisy.tolist()
    assert given_labels(b) == b.noise.noisy.tolist() and (a.noise.true != b.noise.true).any()

def by_row(row): return np.array([row.x, 1.])
OTHERS = (Symmetric(.5), InstanceDependent(.5, get_x=by_row), PairFlip(.3, exact=True))
def drawn(): return [frame_block(o).datasets(frame()).noise.noisy.tolist() for o in OTHERS]

def test_in_another_process_the_same_labels():
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import test_blocks; print(test_blocks.drawn())'
    line = [sys.executable,'-W','ignore','-c',code,str(Path(__file__).parent)]
    out = subprocess.run(line, capture_output=True, text=True)
    assert out.stdout.strip() == str(drawn()), out.stderr

def test_integer_names_missing_labels_and_moved_pairs(tmp_path):
    ints = item_block(Asymmetric(1., {1:2}), lambda i: i%3+1).datasets(range(60)).noise.table
    assert ints.given_label.astype(str).tolist() == ints.true_label.astype(str).replace('1','2').tolist()
    na = item_block('symmetric:0.5', lambda i: 'abc'[i%3], add_na=True).datasets(range(300)).noise
    assert list(na.vocab) == ['#na#','a','b','c'] and (na.noisy > 0).all() and .35 < na.rate < .65
    def noisy(root):
        return pair_block('symmetric:0.5').datasets([[root/f'{i}.png', 'abc'[i%3]] for i in range(60)]).noise.noisy
    assert (noisy(tmp_path/'a') == noisy(tmp_path/'b'/'c')).all()
    dates = frame().set_index(pd.date_range('2020-01-01', periods=240))
    assert frame_block().datasets(dates).noise.flipped.any()

# --- a noise model by name

@pytest.mark.parametrize('text,noise', (
    ('symmetric:0.5',Symmetric(.5)), ('symmetric:0.5:exact',Symmetric(.5,exact=True)), ('pairflip:.45',PairFlip(.45)),
    ('asymmetric:0.4',Asymmetric(.4)), ('asymmetric:0.4:mnist:exact',Asymmetric(.4,'mnist',exact=True)),
    ('instance:0.2',InstanceDependent(.2)), ('none',None)))
def test_noise_models_from_text(text, noise):
    assert make_noise(text) == noise and make_noise(noise) is noise
    if noise is None or isinstance(noise, (Asymmetric,InstanceDependent)): return
    by_text,by_model = (frame_block(o).datasets(frame()).noise.noisy for o in (text, noise))
    assert (by_text == by_model).all()

@pytest.mark.parametrize('f,msg', [
    (lambda: NoisyCategoryBlock('symmetric'), "noise='symmetric'"), (lambda: make_noise('white'), "noise='white'")])
def test_bad_names(f, msg):
    with pytest.raises(ValueError, match=msg): f()

# --- tables and text

def table(df, noise='symmetric:0.5'):
    return TabularPandas(df, [Categorify,FillMissing,Normalize], ['a'], ['x'], 'y',
                         y_block=NoisyCategoryBlock(noise, 3), splits=(list(range(200)),list(range(200,240))))

def test_tabular(tmp_path):
    df = frame().assign(a=list('pqrs')*60)
    to = table(df)
    dls = to.dataloaders(bs=20, path=tmp_path)
    rec,truth = dls.noise,np.array([['cat','dog','owl'].index(o) for o in df.y])
    assert (rec.true == truth[:200]).all() and rec.flipped.sum() > 60
    assert (to.train.y.values == rec.noisy).all() and (to.valid.y.values == truth[200:]).all()
    assert (rec.noisy == frame_block().datasets(frame()).noise.noisy).all()
    for _ in range(2):
        dl = dls.train.new(shuffle=False, drop_last=False)
        assert torch.cat([b[2] for b in dl]).flatten().tolist() == rec.noisy.tolist()
    again = table(pd.concat([df[:200].sample(frac=1, random_state=0), df[200:]])).noise
    assert dict(zip(again.keys, again.noisy)) == dict(zip(rec.keys, rec.noisy))
    assert (table(df.assign(y=truth)).noise.noisy == rec.noisy).all()
    with pytest.raises(ValueError, match='reset_index'): table(pd.concat([df[:120]]*2))
    learn = tabular_learner(dls, layers=[4])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.dls.test_dl(df[:50]).dataset.y.tolist() == truth[:50].tolist()
    again = loaded(learn, tmp_path/'export.pkl').dls
    assert (again.noise.noisy == rec.noisy).all() and again.test_dl(df[:50]).dataset.y.tolist() == truth[:50].tolist()

def test_a_table_is_not_exported_and_its_flips_are_shown(monkeypatch):
    import cloudpickle, IPython.display as ipd
    dls = table(frame().assign(a=list('pqrs')*60), Symmetric(1.)).dataloaders(bs=20)
    again = pickle.loads(cloudpickle.dumps(dls.train.dataset.procs))
    note = next(t for t in again.fs if isinstance(t, _ItemNote))
    assert note.item is None
    note('an item')
    assert note.item == 'an item' and pickle.loads(pickle.dumps(note)).item is None
    shown = []
    monkeypatch.setattr(ipd, 'display', lambda o: shown.append(o.data))
    show_flipped(dls, max_n=5)
    assert shown[0].count('color:red') == 5 and '(true: ' in shown[0]
    dls.show_batch(max_n=5)
    assert 'color:red' not in shown[-1]

class SimpleTok:
    def __call__(self, items): return (str(o).split() for o in items)

def test_text():
    words = [f'{w} number {i} is here' for i in range(30) for w in ('alpha','beta')]
    text = TextBlock.from_df('words', seq_len=8, tok=SimpleTok())
    block = DataBlock((text, NoisyCategoryBlock('symmetric:0.5', 1)), get_x=ColReader('text'), get_y=ColReader('label'),
                      splitter=IndexSplitter(range(50,60)))
    dls = block.dataloaders(pd.DataFrame(dict(words=words, label=['a','b']*30)), bs=8, num_workers=0)
    rec = dls.noise
    assert 10 < rec.flipped.sum() < 40 and rec.true.tolist() == [0,1]*25
    code = {dls.vocab[0].index(w): i for i,w in enumerate(('alpha','beta'))}
    def word(x): return next(code[int(t)] for t in x if int(t) in code)
    seen = [(word(x), int(y)) for b in dls.train.new(drop_last=False) for x,y in zip(*b)]
    assert sorted(seen) == sorted(zip(rec.true.tolist(), rec.noisy.tolist()))
    assert all(word(x) == int(y) for b in dls.valid for x,y in zip(*b))
    show_flipped(dls, max_n=3)

# --- pictures

def titles(): return [(ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes if ax.get_title()]

@pytest.mark.parametrize('seed', range(3))
def test_flipped_labels_are_shown(tmp_path, seed, monkeypatch):
    for i in range(40):
        f = tmp_path/'ab'[i%2]/f'{i}.png'
        f.parent.mkdir(exist_ok=True)
        PILImage.create(np.full((8,8,3), i, np.uint8)).save(f)
    block = DataBlock((ImageBlock, NoisyCategoryBlock('symmetric:0.5', seed)), get_items=get_image_files,
                      get_y=parent_label, splitter=IndexSplitter(range(5)))
    dls = block.dataloaders(tmp_path, bs=8, num_workers=2)
    drawn,plain = [],dls.train.get_idxs
    monkeypatch.setattr(dls.train, 'get_idxs', lambda: drawn.append(plain()) or drawn[-1])
    show_flipped(dls, max_n=8)
    v,rec = dls.vocab,dls.noise
    wrong = [(f'{v[n]}\n(true: {v[t]})','tab:red') if n != t else (v[n],'black') for t,n in zip(rec.true, rec.noisy)]
    shown = titles()
    assert shown == [wrong[i] for i in drawn[-1][:8]]
    assert any('true' in t for t,_ in shown) and not all('true' in t for t,_ in shown)
    pixels = [np.asarray(ax.images[0].get_array()).max() for ax in plt.gcf().axes if ax.get_title()]
    files = [int(dls.train_ds.items[i].stem) for i in drawn[-1][:8]]
    assert pixels == files
    plt.close('all')
    dls.show_batch(max_n=4)
    assert len(titles()) == 4 and all('true' not in t and c=='black' for t,c in titles())
    with pytest.raises(ValueError, match='training set'): show_flipped(dls.valid)
    plt.close('all')

def test_fastai_is_not_patched():
    from fastai.data.core import TfmdDL
    assert not TfmdDL.show_batch.__module__.startswith('fastai_jocor')
