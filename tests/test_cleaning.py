"Data without suspects or with their predicted labels, in memory, from files and in tables, and fastai's cleaner."
import sys, numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, load_learner, tabular_learner
from fastai.vision.all import (CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner,
                               ProgressCallback, RandomSplitter, TransformBlock, accuracy, get_image_files,
                               parent_label, set_seed)
from sklearn.datasets import load_digits
from fastai_jocor.all import InMemoryDataLoaders, JoCorCallback, NoisyCategoryBlock, Symmetric, digits_dls, jocor_mlp
from fastai_jocor.cleaning import SuspectsLearner, cleaned
from fastai_jocor.files import read_table, write_table
from fastai_jocor.lab.run import fast_adam
from learners import quiet
from pictures import digit_files

SPLIT = RandomSplitter(.25, seed=0)
FILES = dict(get_items=get_image_files, get_y=parent_label)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return digit_files(tmp_path_factory.mktemp('pictures'), 300)

def image_block(y, splitter=SPLIT): return DataBlock((ImageBlock, y), splitter=splitter, **FILES)

def frame_dls(pictures):
    files = get_image_files(pictures)
    df = pd.DataFrame(dict(file=[str(f) for f in files], label=[f.parent.name for f in files]))
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'), splitter=SPLIT)
    return block.dataloaders(df.set_axis(range(100, 100+len(df))), bs=16, num_workers=0)

def noisy_dls(pictures):
    return image_block(NoisyCategoryBlock('symmetric:0.3')).dataloaders(pictures, bs=16, num_workers=0)

KINDS = {
    'memory': lambda pictures: digits_dls('symmetric:0.3'),
    'noisy block': noisy_dls,
    'block': lambda pictures: image_block(CategoryBlock).dataloaders(pictures, bs=16, num_workers=0),
    'frame': frame_dls,
    'from_dls': lambda pictures: InMemoryDataLoaders.from_dls(noisy_dls(pictures), n_workers=0, progress=False)}

def other_labels(given, pos, vocab):
    "A table of suspects that are to get the next class"
    return pd.DataFrame(dict(predicted_label=[vocab[(given[i]+1)%len(vocab)] for i in pos]), index=pos)

def after(given, s, how, vocab):
    "Which items are left, and their labels"
    left = [i for i in range(len(given)) if how == 'relabel' or i not in s.index]
    return left,[vocab.index(s.predicted_label[i]) if i in s.index else given[i] for i in left]

@pytest.mark.parametrize('how', ('drop', 'relabel'))
@pytest.mark.parametrize('column', (True, False), ids=('column', 'index'))
def test_suspects_from_a_file(column, how, tmp_path):
    "All cells of such a table are text"
    dls = digits_dls('symmetric:0.3')
    given,vocab,pos = [int(o[1]) for o in dls.train_ds],list(map(str, dls.vocab)),[0,3,12]
    s = other_labels(given, pos, vocab)
    write_table(s.rename_axis('position'), tmp_path/'s.csv')
    kept = read_table(tmp_path/'s.csv')
    if not column: kept = kept.set_index('position')
    same = [labels_in(cleaned(dls, o, how).train) for o in (s, kept)]
    assert same[0] == same[1] and len(same[0]) == len(given)-3*(how == 'drop')
    with pytest.raises(ValueError, match='must be indexed by position'):
        cleaned(dls, kept.rename(index=lambda o: 'a').assign(position='a'), how)

def labels_in(dl):
    batches = dl.new(shuffle=False, drop_last=False)
    return torch.cat([b[-1].as_subclass(torch.Tensor) for b in batches]).flatten().tolist()

@pytest.mark.parametrize('how', ('drop', 'relabel'))
@pytest.mark.parametrize('kind', KINDS)
def test_cleaned(pictures, how, kind):
    dls = KINDS[kind](pictures)
    ds,vocab = dls.train_ds,list(dls.vocab)
    given = [int(ds[i][1]) for i in range(len(ds))]
    s = other_labels(given, [0, 3, len(ds)-1], vocab)
    new = cleaned(dls, s, how)
    left,want = after(given, s, how, vocab)
    assert [int(new.train_ds[i][1]) for i in range(len(new.train_ds))] == want and list(new.vocab) == vocab
    for j in (0, 5, len(left)-1): assert np.array_equal(np.asarray(new.train_ds[j][0]), np.asarray(ds[left[j]][0]))
    assert labels_in(new.train) == want and labels_in(dls.train) == given and new.valid_ds is dls.valid_ds
    assert [int(ds[i][1]) for i in range(len(ds))] == given
    check_record(new, dls, left, want)
    cb = JoCorCallback(k=2, forget_rate=.1)
    model = jocor_mlp(len(vocab), 64 if kind == 'memory' else 192)
    quiet(Learner(new, model, loss_func=CrossEntropyLossFlat())).fit(1, 1e-3, cbs=cb)
    seen = cb.ledger.dropna(subset=['given_label'])
    assert len(cb.ledger) == len(left) and len(seen)
    assert seen.given_label.tolist() == [vocab[want[i]] for i in seen.index]
    if kind in ('noisy block', 'block'): assert cb.ledger['item'].tolist() == [str(ds.items[i]) for i in left]
    if kind == 'frame': assert cb.ledger['item'].tolist() == [ds.items.index[i] for i in left]

def check_record(new, dls, left, want):
    rec,old = getattr(new, 'noise', None),getattr(dls, 'noise', None)
    assert (rec is None) == (old is None)
    if old is None: return
    assert rec.noisy.tolist() == want and rec.true.tolist() == old.true[left].tolist()
    assert rec.noise_rate == rec.rate and len(rec.table) == len(left)
    if old.keys is not None: assert list(rec.keys) == [old.keys[i] for i in left]

@pytest.mark.parametrize('index,label,how,message', [
    ([0, 0], '1', 'drop', 'each once'), ([5000], '1', 'drop', 'position'), ([-1], '1', 'drop', 'position'),
    ([.5], '1', 'drop', 'position'), ([0], 'x', 'relabel', 'that are no classes'), ([0], '1', 'hide', "how='hide'"),
    (range(1257), '1', 'drop', 'nothing is left')])
def test_cleaned_refuses(index, label, how, message):
    s = pd.DataFrame(dict(predicted_label=label), index=list(index))
    with pytest.raises(ValueError, match=message): cleaned(digits_dls(), s, how)

def test_no_suspects(pictures):
    dls = digits_dls('symmetric:0.3')
    for how in ('drop', 'relabel'):
        for s in (pd.DataFrame(dict(predicted_label=[])), pd.DataFrame(dict(predicted_label=['1']), index=[0])[:0]):
            assert cleaned(dls, s, how).noise.noisy.tolist() == dls.noise.noisy.tolist()

def test_cleaned_takes_no_table_of_other_items(pictures, tmp_path):
    dls = digits_dls('symmetric:0.3')
    flipped = np.flatnonzero(dls.noise.flipped)[10:]
    s = pd.DataFrame(dict(item=dls.train_ds.items.to_numpy(), predicted_label=dls.noise.true.astype(str)))
    s = s.rename_axis('position').loc[flipped]
    with pytest.raises(ValueError, match='at position 0, where the training set has'):
        cleaned(dls, s.reset_index(drop=True), 'relabel')
    s.to_csv(tmp_path/'s.csv')
    again = cleaned(dls, pd.read_csv(tmp_path/'s.csv', dtype=dict(predicted_label=str)), 'relabel')
    assert again.noise.flipped.sum() == 10 and cleaned(dls, s).noise.flipped.sum() == 10
    with pytest.raises(ValueError, match="no column 'predicted_label'"): cleaned(dls, s[['item']], 'relabel')

def test_cleaned_takes_no_table_of_another_split(pictures):
    one,two = (image_block(CategoryBlock, RandomSplitter(seed=seed)).dataloaders(pictures, bs=32) for seed in (1, 2))
    s = pd.DataFrame(dict(item=[str(one.train_ds.items[i]) for i in (5, 9)]), index=[5, 9])
    assert len(cleaned(one, s).train_ds) == len(one.train_ds)-2
    with pytest.raises(ValueError, match='of another split'): cleaned(two, s)

@pytest.mark.parametrize('how', ['drop','relabel'])
def test_classes_need_not_be_text(how):
    "Numbers stay numbers"
    digits = load_digits()
    x,y = torch.tensor(digits.data).float(),digits.target+1
    block = DataBlock((TransformBlock, CategoryBlock), getters=[x.__getitem__, y.__getitem__], splitter=SPLIT)
    dls = block.dataloaders(range(len(y)), num_workers=0)
    new = cleaned(dls, pd.DataFrame(dict(predicted_label=['3','10'], position=[0,5])), how)
    assert list(new.vocab) == list(dls.vocab) == list(range(1, 11))
    names = [new.vocab[int(o)] for o in new.train_ds.tls[1]]
    want = y[dls.train_ds.items].tolist()
    if how == 'relabel': want[0],want[5] = 3,10
    else: del want[5],want[0]
    assert names == want

def test_cleaned_text():
    from fastai.text.all import TextDataLoaders
    texts = ['alpha beta', 'gamma delta', 'beta beta', 'delta gamma']*20
    df = pd.DataFrame(dict(text=texts, label=['c0', 'c1']*40, is_valid=[False]*60+[True]*20))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=8)
    labels = lambda dls: [int(dls.train_ds[i][1]) for i in range(len(dls.train_ds))]
    given,s = labels(dls),pd.DataFrame(dict(predicted_label=['c0', 'c1']), index=[1, 2])
    assert labels(cleaned(dls, s, 'relabel')) == [given[0], 0, 1, *given[3:]]
    new = cleaned(dls, s)
    assert list(new.train_ds.tls[1].vocab) == ['c0', 'c1'] and labels(new) == [given[0], *given[3:]]

def test_weights_stay_with_their_items(pictures):
    n = len(get_image_files(pictures))
    dls = image_block(CategoryBlock).weighted_dataloaders(pictures, np.arange(1, n+1), bs=16, num_workers=0)
    new = cleaned(dls, pd.DataFrame(dict(predicted_label='c0'), index=[2, 5]))
    left = np.setdiff1d(np.arange(len(dls.train_ds)), [2, 5])
    np.testing.assert_allclose(new.train.wgts, dls.train.wgts[left]/dls.train.wgts[left].sum())

# tables

def wine(noise=None):
    "A real table: chemistry of 178 wines of three growers, one column as a category"
    from sklearn.datasets import load_wine
    d = load_wine(as_frame=True)
    names = [o for o in d.data if o != 'hue']
    hue = pd.cut(d.data.hue, 3, labels=['pale', 'mid', 'deep']).astype(str)
    df = d.data[names].assign(shade=hue, grower=[f'grower {t}' for t in d.target])
    df = df.set_axis(range(1000, 1000+len(df)))
    df.loc[1005, 'ash'] = np.nan
    block = NoisyCategoryBlock(noise) if noise else CategoryBlock()
    procs = [Categorify, FillMissing, Normalize]
    return df,TabularPandas(df, procs, ['shade'], names, 'grower', y_block=block, splits=SPLIT(df))

@pytest.mark.parametrize('noise', (None, 'symmetric:0.3'))
@pytest.mark.parametrize('how', ('drop', 'relabel'))
def test_cleaned_table(how, noise):
    dls = wine(noise)[1].dataloaders(bs=16, num_workers=0)
    ds,vocab = dls.train_ds,list(dls.vocab)
    given,before = ds.y.tolist(),ds.items.copy()
    s = other_labels(given, [0, 7, len(ds)-1], vocab)
    new = cleaned(dls, s, how)
    left,want = after(given, s, how, vocab)
    assert labels_in(new.train) == want and labels_in(dls.train) == given
    inputs = [[torch.cat(o) for o in list(zip(*d.train.new(shuffle=False, drop_last=False)))[:2]] for d in (new, dls)]
    for x,old in zip(*inputs): assert torch.equal(x, old[left])
    assert new.train_ds.items.index.tolist() == ds.items.index[left].tolist() and list(new.vocab) == vocab
    assert new.valid_ds is dls.valid_ds and type(new) is type(dls)
    pd.testing.assert_frame_equal(ds.items, before)
    check_record(new, dls, left, want)
    cb = JoCorCallback(k=2, forget_rate=.1)
    quiet(tabular_learner(new, layers=[30], metrics=accuracy)).fit(3, 1e-3, cbs=cb)
    seen = cb.ledger[cb.ledger.seen > 0]
    assert cb.ledger['item'].tolist() == ds.items.index[left].tolist()
    assert seen.given_label.tolist() == [vocab[want[i]] for i in seen.index]
    assert cleaned(new, s[:0]).train_ds.y.tolist() == want

@pytest.mark.filterwarnings('ignore')
def test_a_learner_on_a_cleaned_table_can_be_exported(tmp_path):
    df,to = wine('symmetric:0.3')
    new = cleaned(to.dataloaders(bs=16, path=tmp_path, num_workers=0), pd.DataFrame(index=[0, 7]))
    learn = quiet(tabular_learner(new, layers=[30], metrics=accuracy, path=tmp_path))
    learn.fit(1, 1e-3)
    p = learn.get_preds(dl=learn.dls.test_dl(df[:20]))[0]
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    loaded.remove_cb(ProgressCallback)
    assert torch.equal(loaded.get_preds(dl=loaded.dls.test_dl(df[:20]))[0], p)

def test_an_audit_of_a_table():
    "From wrong labels in a table to a better table"
    set_seed(0)
    dls = wine('symmetric:0.25')[1].dataloaders(bs=16)
    learn,cb = quiet(tabular_learner(dls, layers=[50], metrics=accuracy)),JoCorCallback(k=3, forget_rate='auto')
    learn.fit_one_cycle(20, 1e-2, cbs=cb)
    s,rec = cb.suspects(),dls.noise
    assert cb.ledger['item'].tolist() == dls.train_ds.items.index.tolist() and len(s) > 10 and s.flipped.mean() > .7
    ax = cb.plot_suspects(2)[0]
    assert 'shade: ' in ax.texts[0].get_text()
    assert ax.get_title() == f'{s.given_label.iloc[0]} → {s.predicted_label.iloc[0]}'
    plt.close('all')
    dropped,relabelled = cleaned(dls, s),cleaned(dls, s, 'relabel')
    assert len(dropped.train_ds) == len(rec)-len(s)
    assert max(dropped.noise.rate, relabelled.noise.rate) < .6*rec.rate
    second = quiet(tabular_learner(dropped, layers=[50], metrics=accuracy))
    second.fit_one_cycle(20, 1e-2)
    assert second.validate()[1] > .9

def test_cleaned_refuses_what_has_no_class():
    df = pd.DataFrame(dict(x=np.arange(20.), y=np.arange(20.)))
    dls = TabularPandas(df, [], [], ['x'], 'y', splits=(list(range(15)), list(range(15, 20)))).dataloaders(bs=4)
    with pytest.raises(ValueError, match='one label per item'): cleaned(dls, pd.DataFrame(index=[0]))

# fastai's cleaner

@pytest.fixture(scope='module')
def trained_on_files(tmp_path_factory):
    "A learner on image files that was trained under wrong labels, and its callback"
    set_seed(0)
    dls = noisy_dls(digit_files(tmp_path_factory.mktemp('files'), 10**4))
    learn,cb = quiet(Learner(dls, jocor_mlp(3, 192), opt_func=fast_adam)),JoCorCallback(k=2)
    learn.fit_one_cycle(8, 1e-2, cbs=cb)
    return learn,cb

def test_cleaner_ranks_suspects_first(trained_on_files):
    learn,cb = trained_on_files
    f,s = cb.ledger,cb.suspects(score='loss')
    feed = SuspectsLearner(learn, cb, 'loss')
    as_cleaner = dict(with_input=False, with_loss=True, with_decoded=True)
    preds = lambda dl: feed.get_preds(dl=dl.new(shuffle=False, drop_last=False), **as_cleaner)
    _,targs,_,scores = preds(feed.dls[0])
    order = np.argsort(-scores.numpy(), kind='stable')
    assert targs.tolist() == learn.dls.noise.noisy.tolist() and 20 < len(s) < len(f)
    assert order[:len(s)].tolist() == s.index.tolist()
    rest = f.loss[order[len(s):]]
    assert rest.is_monotonic_decreasing and rest.iloc[0] > s.score.min()
    assert len(preds(feed.dls[1])) == 4
    dls = digits_dls()
    with pytest.raises(ValueError, match='pass the learner that the callback trained'):
        SuspectsLearner(Learner(dls, jocor_mlp(10, 64)), cb).get_preds(dl=dls.train)

def test_the_cleaner_of_fastai(trained_on_files, monkeypatch):
    "The real widget, driven as its dropdowns drive it"
    pytest.importorskip('ipywidgets')
    import fastai.vision.widgets, IPython.display
    from fastai.vision.widgets import ImageClassifierCleaner
    monkeypatch.setattr(fastai.vision.widgets, 'display', IPython.display.display, raising=False)
    learn,cb = trained_on_files
    w,s = cb.cleaner(learn, max_n=12),cb.suspects()
    assert isinstance(w, ImageClassifierCleaner) and list(w.dd_cats.options) == list(learn.dls.vocab)
    for c in learn.dls.vocab:
        w.dd_cats.value = c
        own = s[s.given_label == c]
        n = min(len(own), 12)
        assert n > 3 and [str(o) for o in w.iw.fns[:n]] == own['item'].tolist()[:n]
        assert len(w.iw.widget.children) == len(w.iw.fns) and len(w.delete()) == 0 and len(w.change()) == 0
    choose = lambda i,v: setattr(w.iw.widget.children[i].children[1], 'value', v)
    other = own.predicted_label.iloc[2]
    choose(0, '<Delete>')
    choose(2, other)
    choose(3, '<Delete>')
    assert list(w.delete()) == [0, 3] and list(w.change()) == [(2, other)]
    assert [str(w.fns[i]) for i in w.delete()] == own['item'].iloc[[0, 3]].tolist()
    w.dd_ds.value = 'Valid'
    assert {str(o) for o in w.iw.fns} <= {str(o) for o in learn.dls.valid_ds.items}

def test_cleaner_without_ipywidgets(trained_on_files, monkeypatch):
    learn,cb = trained_on_files
    monkeypatch.setitem(sys.modules, 'fastai.vision.widgets', None)
    with pytest.raises(ImportError, match='pip install ipywidgets'): cb.cleaner(learn)
