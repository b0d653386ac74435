"Labels judged by networks that were not told them: features, probabilities, the audit as a whole."
import json, re, shutil, sys, numpy as np, pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from pathlib import Path
from types import SimpleNamespace
from fastai.tabular.all import Normalize, TabularPandas, tabular_learner
from fastai.vision.all import Brightness, CategoryBlock, DataBlock, Flip, get_image_files, ImageBlock, parent_label
from fastai.vision.all import accuracy, Learner, PILImage, ProgressCallback, RandomSplitter, Recorder, Resize
from fastai.vision.all import resnet18, set_seed, vision_learner
from fastai_jocor.all import audit_labels, cleaned, feature_dls, feature_learner, JoCorCallback, NoisyCategoryBlock
from fastai_jocor.all import Peers, Symmetric
from fastai_jocor.features import body_of, feature_folder, in_order, kept_features
from fastai_jocor.feature_loaders import FeatureItems, given_labels
from fastai_jocor.judge import has_features, Judgement
from fastai_jocor.posterior import calibration_error, shifted, transition_by_em
from pictures import digit_files

ROOT = Path(__file__).resolve().parent.parent

def picture_learner(folder, noise=None, valid=.2, size=32, arch=resnet18, **kwargs):
    "A body with random weights: it is as frozen as a pretrained one, and no download is needed"
    set_seed(0)
    labels = CategoryBlock if noise is None else NoisyCategoryBlock(noise, seed=0)
    block = DataBlock((ImageBlock, labels), get_items=lambda p: get_image_files(p).sorted(), get_y=parent_label,
                      splitter=RandomSplitter(valid, seed=0), item_tfms=Resize(size), **kwargs)
    return vision_learner(block.dataloaders(folder, bs=16, num_workers=0), arch, pretrained=False, path=folder)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return digit_files(tmp_path_factory.mktemp('digits'), 1700)

@pytest.fixture
def few(tmp_path): return digit_files(tmp_path/'digits', 120)

@pytest.fixture(scope='module')
def audited(pictures):
    learn = picture_learner(pictures, Symmetric(.25))
    before = {n: o.clone() for n,o in learn.model.state_dict().items()}
    return learn,before,audit_labels(learn, progress=False)

# --- features

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "Where features are kept, in a cache of the test's own"
    monkeypatch.setattr('fastai_jocor.features.xdg_cache_home', lambda: tmp_path/'cache')
    return feature_folder()

def files_in(folder): return sorted(folder.glob('*.npy'))

def test_nothing_is_written_into_the_folder_of_the_images(few, cache):
    before = sorted(few.rglob('*'))
    learn = picture_learner(few)
    feature_dls(learn, progress=False)
    assert learn.path == few and sorted(few.rglob('*')) == before and len(files_in(cache)) == 2
    feature_dls(learn, few/'here', progress=False)
    assert len(files_in(few/'here')) == len(files_in(cache)) == 2

def test_no_features_are_kept_where_nothing_can_be_written(few, tmp_path, monkeypatch):
    (tmp_path/'a_file').write_text('')
    monkeypatch.setattr('fastai_jocor.features.xdg_cache_home', lambda: tmp_path/'a_file')
    with pytest.warns(UserWarning, match='no features can be kept in .*: name another folder with folder='):
        dls = feature_dls(picture_learner(few), progress=False)
    assert len(dls.train.dataset) == len(picture_learner(few).dls.train_ds)

def test_features_are_of_validation_transforms_and_kept(few, cache):
    learn = picture_learner(few, batch_tfms=[Flip(p=1.), Brightness(.9, p=1.)])
    dls = feature_dls(learn, progress=False)
    body = body_of(learn.model).eval()
    with torch.no_grad(): want = torch.cat([body(o[0]) for o in in_order(learn.dls.train, bs=7, progress=False)])
    kept = kept_features(body, learn.dls.train, cache)
    nine = learn.dls.test_dl(learn.dls.train_ds.items[:9], bs=9, num_workers=0).one_batch()[0]
    plain = body(nine).detach()
    np.testing.assert_allclose(kept[:9], plain, atol=1e-3)
    np.testing.assert_allclose(kept, want, atol=1e-3)
    assert learn.dls.train_ds.split_idx == 0 and len(files_in(cache)) == 2
    assert dls.train.dataset.items == [str(o) for o in learn.dls.train_ds.items]
    assert (given_labels(learn.dls.train) == dls.train.dataset.y.numpy()).all()

def test_what_features_depend_on(few, cache):
    feature_dls(picture_learner(few), progress=False)
    learn = picture_learner(few)
    feature_dls(learn, progress=False)
    assert len(files_in(cache)) == 2
    feature_dls(picture_learner(few, size=40), progress=False)
    assert len(files_in(cache)) == 4
    changed = learn.dls.valid_ds.items[0]
    shutil.copy(learn.dls.train_ds.items[0], changed)
    feature_dls(learn, progress=False)
    assert len(files_in(cache)) == 5
    with torch.no_grad(): learn.model[0][0].weight.add_(.1)
    feature_dls(learn, progress=False)
    assert len(files_in(cache)) == 7

@pytest.mark.parametrize('spoil', (lambda f: f.write_bytes(f.read_bytes()[:-100]), lambda f: f.write_bytes(b'nothing'),
    lambda f: f.write_bytes(f.read_bytes()[:-2]+b'xx')), ids=('cut','other','changed'))
def test_spoilt_files_are_noticed(few, cache, spoil):
    learn = picture_learner(few)
    body = body_of(learn.model)
    want = kept_features(body, learn.dls.train, cache).copy()
    spoil(files_in(cache)[0])
    with pytest.warns(UserWarning, match='computed again'): again = kept_features(body, learn.dls.train, cache)
    np.testing.assert_array_equal(again, want)

# --- probabilities

def by_loops(p, given, steps, prior):
    "EM in float64, item by item"
    n,C = p.shape
    T = [[.7*(i == j)+.3/C for j in range(C)] for i in range(C)]
    for _ in range(steps):
        counts = [[prior*(i == j) for j in range(C)] for i in range(C)]
        for q,y in zip(p.tolist(), given):
            joint = [q[c]*T[c][y] for c in range(C)]
            for c in range(C): counts[c][y] += joint[c]/sum(joint)
        T = [[o/sum(row) for o in row] for row in counts]
    return np.array(T)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(2, 4), st.integers(1, 40))
def test_em_is_the_same_as_loops(seed, C, n):
    rng = np.random.default_rng(seed)
    p,given = rng.dirichlet(np.ones(C), n),rng.integers(0, C, n)
    np.testing.assert_allclose(transition_by_em(p, given, 5)[0], by_loops(p, given, 5, 5.), atol=1e-9)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(.01, .99))
def test_shifted(p, mean):
    q = shifted(np.array(p), mean)
    assert q.mean() == pytest.approx(mean, abs=1e-6) and (np.diff(q[np.argsort(p)]) > -1e-12).all()

def made_up(n=3000, C=4, seed=0, sure=3., flip=.3):
    "Peers that know the classes, more or less, and labels that are wrong in pairs"
    rng = np.random.default_rng(seed)
    true = rng.integers(0, C, n)
    wrong = (rng.random(n) < flip) & (true % 2 == 0)
    said = rng.normal(0, 1.5, (3,n,C))
    said[:,np.arange(n),true] += sure
    given = np.where(wrong, true+1, true)
    said -= np.log(np.exp(said).sum(-1, keepdims=True))
    return said.astype(np.float32), np.arange(n)%3, given, wrong

def test_a_judgement():
    said,hidden,given,wrong = made_up()
    j = Judgement(said, hidden, given)
    assert j.learned and j.trusted and j.low <= wrong.mean() <= j.high
    assert calibration_error(j.p_wrong, wrong) < .05
    assert abs(j.p_wrong.mean()-wrong.mean()) < .03
    assert (j.untold == said[hidden,np.arange(len(given))]).all()
    sure = wrong & (j.p_wrong > .9)
    assert (j.believed != given).all() and (j.believed[sure] == given[sure]-1).all()

def test_the_matrix_tells_errors_in_pairs_from_doubt():
    "Bayes with the transition matrix ranks better than the probability of the label alone"
    from sklearn.metrics import average_precision_score
    said,hidden,given,wrong = made_up(sure=2., flip=.4)
    j = Judgement(said, hidden, given)
    alone = -j.untold[np.arange(len(given)),given]
    assert average_precision_score(wrong, j.p_wrong) > average_precision_score(wrong, alone)+.1

def test_nothing_learned_is_said():
    said,hidden,given,_ = made_up(sure=0.)
    assert not Judgement(said, hidden, given).learned
    assert not Judgement(said, hidden, given).trusted

# --- the audit

def test_an_audit(audited):
    learn,before,audit = audited
    t,s = audit.table,audit.suspects()
    flipped = t[t.part == 'train'].flipped.astype(bool)
    assert s.flipped.fillna(False).mean() > .9 and s.flipped.sum() > .8*flipped.sum()
    e = audit.expected_wrong('train')
    assert e['low'] <= flipped.sum() <= e['high'] and abs(e['expected']-flipped.sum()) < .2*flipped.sum()
    assert (s.p_wrong >= .5).all() and s.p_wrong.is_monotonic_decreasing
    assert (t[t.part == 'valid'].p_wrong < .5).mean() > .95
    assert t['item'].tolist() == [str(o) for o in (*learn.dls.train_ds.items, *learn.dls.valid_ds.items)]
    right = s.predicted_label == s.true_label
    assert right[s.p_wrong > .9].mean() > .9
    assert len(audit.labels) == len(audit.pred_probs) == len(t) and np.allclose(audit.pred_probs.sum(1), 1)

def test_the_learner_is_as_it_was(audited):
    learn,before,_ = audited
    assert all(torch.equal(o, before[n]) for n,o in learn.model.state_dict().items())
    assert not isinstance(learn.model, Peers) and not any(isinstance(o, JoCorCallback) for o in learn.cbs)

def test_suspects_of_an_audit_clean_the_data(audited):
    learn,_,audit = audited
    s = audit.suspects(part='train')
    new = cleaned(learn.dls, s)
    assert len(new.train_ds) == len(learn.dls.train_ds)-len(s)
    assert new.noise.rate < .3*learn.dls.noise.rate

@pytest.mark.parametrize('bad,message', [(dict(least=2), 'least=2'), (dict(part='test'), "part='test'")])
def test_bad_questions(audited, bad, message):
    with pytest.raises(ValueError, match=message): audited[2].suspects(**bad)

def test_one_head_is_too_few(audited):
    with pytest.raises(ValueError, match='k=1 must be at least 2'): audit_labels(audited[0], k=1)

def test_heads_are_trained_in_batches_that_suit_the_number_of_items(few, cache, monkeypatch):
    learn = picture_learner(few)
    n = len(learn.dls.train_ds)
    for batch,lr in (((8, .01), None), ((4, .02), .005)):
        monkeypatch.setattr('fastai_jocor.judge.default_batch', {n: batch}.get)
        heads = audit_labels(learn, epochs=4, lr=lr, progress=False).heads
        assert heads.dls.bs == batch[0]
        assert max(heads.recorder.hps['lr']) == pytest.approx(lr or batch[1], rel=.2)

def test_without_a_validation_set(few):
    learn = picture_learner(few, Symmetric(.2), valid=0.)
    audit = audit_labels(learn, epochs=3, progress=False)
    assert set(audit.table.part) == {'train'} and len(audit.table) == len(learn.dls.train_ds)

def test_nothing_learned_lists_nothing(few):
    "Labels that have nothing to do with the pictures"
    items,rng = get_image_files(few).sorted(),np.random.default_rng(0)
    given = dict(zip(items, rng.integers(0, 3, len(items)).astype(str)))
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: items, get_y=given.get, item_tfms=Resize(32),
                      splitter=RandomSplitter(0., seed=0))
    learn = vision_learner(block.dataloaders(few, bs=16, num_workers=0), resnet18, pretrained=False, path=few)
    audit = audit_labels(learn, progress=False)
    assert not audit.learned and 'nothing can be said' in str(audit)
    with pytest.warns(UserWarning, match='nothing can be said'): assert not len(audit.suspects())
    with pytest.warns(UserWarning, match='nothing can be said'): all_of_them = audit.suspects(least=0., anyway=True)
    assert len(all_of_them) == len(items)

def test_near_duplicates_and_strangers(few):
    items = get_image_files(few).sorted()
    shutil.copy(items[0], few/'c1'/'twin.png')
    PILImage.create(np.full((64,64,3), [255,0,0], dtype=np.uint8)).save(few/'c2'/'odd.png')
    audit = audit_labels(picture_learner(few), epochs=2, progress=False)
    pairs = audit.duplicates()
    assert {Path(pairs.item[0]).name, Path(pairs.item_2[0]).name} == {items[0].name, 'twin.png'}
    assert not pairs.same_label[0]
    notes = audit.table.set_index('item').note
    assert 'almost equal to' in notes[str(few/'c1'/'twin.png')] and 'labelled c0' in notes[str(few/'c1'/'twin.png')]
    assert str(few/'c2'/'odd.png') in set(audit.strangers()['item'])

def test_a_table(tmp_path):
    "A model without a body is trained as a whole, from new weights"
    from sklearn.datasets import load_wine
    d = load_wine(as_frame=True)
    df = d.data.assign(kind=np.array(['a','b','c'])[d.target])
    right = df.kind.copy()
    wrong = np.random.default_rng(0).permutation(len(df))[:25]
    df.loc[wrong, 'kind'] = right[wrong].map(dict(a='b', b='c', c='a'))
    to = TabularPandas(df, [Normalize], cont_names=list(d.data), y_names='kind', y_block=CategoryBlock(),
                       splits=(list(range(len(df))), []))
    learn = tabular_learner(to.dataloaders(bs=16), layers=[32], path=tmp_path)
    s = audit_labels(learn, epochs=30, progress=False).suspects()
    hit = s.position.isin(wrong)
    assert hit.mean() > .5 and hit.sum() > 20
    assert (s.predicted_label[hit] == right[s.position[hit]].to_numpy()).mean() > .8

# --- to other tools

def block_with(text):
    "The block of Python in a tutorial that holds some text"
    pages = [json.loads(p.read_text(encoding='utf-8')) for p in (ROOT/'nbs'/'tutorials').glob('*.ipynb')]
    cells = [''.join(c['source']) for page in pages for c in page['cells'] if c['cell_type'] == 'markdown']
    return next(b for c in cells for b in re.findall(r'```python\n(.*?)```', c, re.S) if text in b)

def fiftyone(shown):
    "What the lines use of FiftyOne, as its documentation says: a sample has a file, tags, and fields of plain values"
    class Classification:
        def __init__(self, label): assert type(label) is str
    class Sample:
        def __init__(self, filepath, tags=None, metadata=None, **fields):
            assert Path(filepath).is_file() and all(type(o) is str for o in tags)
            assert all(isinstance(o, (str,bool,int,float)) for o in fields.values())
            self.fields = fields
        def __setitem__(self, name, o): self.fields[name] = o if isinstance(o, Classification) else 1/0
    class Dataset:
        def __init__(self, name): self.samples = []
        def add_samples(self, samples): self.samples += samples
        def sort_by(self, name, reverse=False):
            return sorted(self.samples, key=lambda o: o.fields[name], reverse=reverse)
    return SimpleNamespace(Classification=Classification, Sample=Sample, Dataset=Dataset,
                           launch_app=lambda view: shown.append(view))

def test_the_lines_for_fiftyone(audited, monkeypatch):
    shown = []
    monkeypatch.setitem(sys.modules, 'fiftyone', fiftyone(shown))
    exec(block_with('import fiftyone'), dict(audit=audited[2]))
    p = [o.fields['p_wrong'] for o in shown[0]]
    assert len(p) == len(audited[2].table) and p == sorted(p, reverse=True)

def test_the_lines_for_spotlight(audited, monkeypatch):
    "A frame, and the type of the columns that are not plain values: files of images"
    def show(df, dtype):
        assert dtype == {'item': 'image'} and all(Path(o).is_file() for o in df['item'])
        assert df.p_wrong.is_monotonic_decreasing and df.given_label.map(type).eq(str).all()
    spotlight = SimpleNamespace(show=show, Image='image')
    monkeypatch.setitem(sys.modules, 'renumics', SimpleNamespace(spotlight=spotlight))
    exec(block_with('from renumics import spotlight'), dict(audit=audited[2]))

def test_the_lines_for_cleanlab(audited):
    pytest.importorskip('cleanlab')
    audit,names = audited[2],{}
    exec(block_with('from cleanlab.filter'), dict(audit=audit), names)
    found = audit.table.iloc[names['issues']]
    of_train = found[found.part == 'train']
    assert of_train.flipped.mean() > .7 and len(of_train) > .7*audit.table.flipped.eq(True).sum()

# --- a pretrained network in a plain learner

def plain_learner(folder, noise=None):
    "A network of torchvision whose normalisation layers look pretrained"
    dls = picture_learner(folder, noise).dls
    net = torchvision.models.resnet18(num_classes=3)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.weight, .8, 1.2)
    return Learner(dls, net, metrics=accuracy, path=folder)

def test_a_pretrained_network_in_a_plain_learner_is_audited_on_its_features(tmp_path):
    learn = plain_learner(digit_files(tmp_path, 500), Symmetric(.25))
    before = {n: o.clone() for n,o in learn.model.state_dict().items()}
    audit = audit_labels(learn, progress=False)
    assert isinstance(audit.heads.dls.train.dataset, FeatureItems) and audit.learned and not audit.by_heart
    wrong = audit.table[audit.table.part == 'train'].flipped.astype(bool)
    p = audit.table.p_wrong[wrong.index]
    assert p[wrong].mean() > p[~wrong].mean()+.3
    assert all(torch.equal(o, before[n]) for n,o in learn.model.state_dict().items())

def test_heads_go_back_on_a_pretrained_network(few):
    learn = plain_learner(few)
    heads = feature_learner(learn, feature_dls(learn, progress=False))
    for o in (learn, heads): o.remove_cbs([ProgressCallback, Recorder])
    heads.fit_one_cycle(2, 3e-3, cbs=JoCorCallback(k=3))
    learn.take_heads(heads)
    assert isinstance(learn.model, Peers) and isinstance(learn.model.peer(0), torchvision.models.ResNet)
    torch.testing.assert_close(learn.get_preds()[0], heads.get_preds()[0], atol=1e-2, rtol=0)
    learn.take_heads(heads) # as a cell of a notebook is run twice
    torch.testing.assert_close(learn.get_preds()[0], heads.get_preds()[0], atol=1e-2, rtol=0)
    again = feature_dls(learn, progress=False)
    torch.testing.assert_close(again.train.dataset.x, heads.dls.train.dataset.x) # features of the same body

def test_a_network_that_a_learner_has_trained_is_no_body(few):
    learn = plain_learner(few)
    assert has_features(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert not has_features(learn)

class HeadFirst(torch.nn.Module):
    "A network that defines its head before its body, which ends in a linear layer, too"
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(7, 3)
        self.body = torchvision.models.resnet18(num_classes=7)
        torch.nn.init.uniform_(self.body.bn1.weight)
    def forward(self, x): return self.head(self.body(x))

def test_a_last_linear_layer_that_does_not_give_the_logits_is_found_out(few):
    dls = picture_learner(few).dls
    assert body_of(HeadFirst()) is not None and not has_features(Learner(dls, HeadFirst()))

def test_few_items_are_trained_on_in_small_batches_and_all_of_them(few):
    dls = feature_dls(picture_learner(few), progress=False)
    n = len(dls.train.dataset)
    assert n < 300 and dls.train.bs == 16
    assert sum(len(y) for _,y in dls.train) == (n if n%16 != 1 else n-1)
