"`cbs=JoCorCallback(k=3)` on every kind of learner: pictures, text, tables, several inputs, and what is exported."
import copy, importlib.util, shutil, pytest, torch
import numpy as np, pandas as pd
import torch.nn.functional as F
from fastai.vision.all import (Callback, ClassificationInterpretation, CrossEntropyLossFlat,
    DataBlock, ImageBlock, Interpretation, Learner, MultiCategoryBlock, PILImage, RandomSplitter, TransformBlock,
    accuracy, accuracy_multi, get_image_files, load_learner, nn, parent_label, resnet18, set_seed, vision_learner)
from fastai_jocor.all import *
from fastai_jocor.peers import Peers
from fastai_jocor.copies import make_peers
from fastai_jocor.selection import default_num_gradual, forget_schedule
from learners import digits, finite, plain, quiet
from test_trainer import silent

# --- pictures

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    from sklearn.datasets import load_digits
    d,tmp = load_digits(),tmp_path_factory.mktemp('pictures')
    for i,(im,t) in enumerate(zip(d.images[:401], d.target)):
        if t > 2: continue
        (tmp/str(t)).mkdir(exist_ok=True)
        pixels = np.repeat((im*15).astype(np.uint8)[...,None], 3, -1)
        PILImage.create(pixels).resize((32,32)).save(tmp/str(t)/f'{i}.png')
    return tmp

def picture_dls(path, noise='symmetric:0.3', **kwargs):
    blocks = ImageBlock, NoisyCategoryBlock(noise)
    block = DataBlock(blocks, get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0))
    return block.dataloaders(path, bs=16, num_workers=0, **kwargs)

def picture_learner(path, arch=resnet18, to='.', **kwargs):
    set_seed(0)
    return quiet(vision_learner(picture_dls(path), arch, pretrained=False, metrics=accuracy, path=to, **kwargs))

class Groups(Callback):
    "Rates, frozen groups and what the optimizer notes of each parameter, at the beginning of each fit"
    order = 90
    def __init__(self): self.seen = []
    def before_fit(self):
        opt = self.learn.opt
        notes = lambda p: {name: v for name,v in opt.state[p].items() if name in ('do_wd','force_train')}
        self.seen.append(dict(lr=[h['lr'] for h in opt.hypers], frozen=opt.frozen_idx,
            n=[len(g) for g in opt.param_lists], on=[[p.requires_grad for p in g] for g in opt.param_lists],
            notes=[[notes(p) for p in g] for g in opt.param_lists]))

ARCHS = [resnet18] + ['resnet10t']*bool(importlib.util.find_spec('timm'))

@pytest.mark.parametrize('kw', ({}, dict(rule='schedule')), ids=('evidence','schedule'))
@pytest.mark.parametrize('arch', ARCHS, ids=('resnet18','timm')[:len(ARCHS)])
def test_vision_learner_fine_tune(pictures, arch, kw, tmp_path):
    "Groups, rates and frozen bodies are those of the single model, for each peer"
    single,learn = [picture_learner(pictures, arch, tmp_path) for _ in range(2)]
    for l in (single,learn): l.pretrained = True
    one,two,cb,model = Groups(),Groups(),JoCorCallback(k=2, **kw),learn.model
    with silent():
        single.fine_tune(2, 2e-3, freeze_epochs=1, cbs=one)
        learn.fine_tune(2, 2e-3, freeze_epochs=1, cbs=[cb, two])
    for a,b in zip(one.seen, two.seen, strict=True):
        assert a['lr'] == pytest.approx(b['lr']) and a['frozen'] == b['frozen'] and [2*n for n in a['n']] == b['n']
        assert [g*2 for g in a['on']] == b['on'] and [g*2 for g in a['notes']] == b['notes']
    assert [o['frozen'] > 0 for o in one.seen] == [True,False]
    assert any(p.get('force_train') for g in one.seen[0]['notes'] for p in g)
    assert learn.model.k == 2 and learn.model.peer(0) is model
    rates = forget_schedule(learn.dls.noise.noise_rate, 3, default_num_gradual(3, len(learn.dls.train)))
    assert cb.history.epoch.tolist() == [0,0,1]
    if kw: assert cb.history.R.tolist() == rates.tolist()
    else: assert cb.history.R[0] == 0 and cb.history.kept[0] == 1 # frozen
    assert learn.get_preds()[0].shape[1] == 3

@pytest.mark.parametrize('train_bn', (True,False))
def test_batch_norm_of_frozen_peers(pictures, train_bn):
    "With train_bn the weights of a frozen body's norms move in every peer, without it they stay; its statistics move"
    learn = picture_learner(pictures, train_bn=train_bn, cut=-4)
    learn.freeze()
    first_norm = lambda m: next(o for o in m[0].modules() if isinstance(o, nn.BatchNorm2d))
    before = copy.deepcopy(first_norm(learn.model))
    learn.fit(1, 1e-2, cbs=JoCorCallback(k=2))
    for m in learn.model.peers:
        bn = first_norm(m)
        assert bn.weight.requires_grad == train_bn and (not torch.equal(bn.weight, before.weight)) == train_bn
        assert not torch.equal(bn.running_mean, before.running_mean)

@pytest.fixture
def trained(pictures, tmp_path):
    learn = picture_learner(pictures, to=tmp_path)
    with silent(): learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    return learn

def test_interpretation(trained):
    with silent(), trained.no_bar():
        preds,y = trained.get_preds()
        matrix = ClassificationInterpretation.from_learner(trained).confusion_matrix()
        losses,_ = Interpretation.from_learner(trained).top_losses(3)[:2]
    assert matrix.sum() == len(y) and np.trace(matrix) == (preds.argmax(1) == y).sum()
    want = F.nll_loss(plain(preds).log(), plain(y), reduction='none').sort(descending=True).values[:3]
    torch.testing.assert_close(plain(torch.as_tensor(losses).float()), want, atol=1e-4, rtol=1e-4)

def test_augmented_predictions(trained):
    with silent(), trained.no_bar(): probs,_ = trained.tta(n=2)
    assert probs.shape[1] == 3 and torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-3)

def test_summary_and_results(trained, capsys):
    with silent(), trained.no_bar():
        text = str(trained.summary())
        trained.show_results(max_n=4)
        trained.show_training_loop()
    assert 'Peers' in text and 'Total params' in text

def test_multi_category_block(pictures):
    labels = lambda f: [parent_label(f)] + ['even']*(int(f.stem) % 2 == 0)
    blocks,split = (ImageBlock, MultiCategoryBlock),RandomSplitter(seed=0)
    block = DataBlock(blocks, get_items=get_image_files, get_y=labels, splitter=split)
    dls = block.dataloaders(pictures, bs=16, num_workers=0)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, metrics=accuracy_multi))
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1))
    with learn.no_bar(): assert learn.predict(get_image_files(pictures)[0])[2].shape == (4,)

# --- text, tables, several inputs

def same_after_export(learn, item, tmp_path):
    with silent(), learn.no_bar():
        want = learn.predict(item)[2]
        learn.path = tmp_path
        learn.export('e.pkl')
        loaded = load_learner(tmp_path/'e.pkl')
        with loaded.no_bar(): got = loaded.predict(item)[2]
    assert isinstance(loaded.model, Peers)
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want))
    assert torch.as_tensor(want).sum() == pytest.approx(1, abs=1e-4)

class Words:
    "A tokenizer that splits at spaces"
    def __call__(self, items): return (str(o).split() for o in items)

def sentences():
    "Two hundred sentences, good or bad"
    rs = np.random.RandomState(0)
    def one(word): return ' '.join(rs.permutation(['so','it','was',word,word,*'abcdef'[:rs.randint(6)]]))
    rows = [(one(word), label) for word,label in (('good','pos'),('bad','neg')) for _ in range(100)]
    return pd.DataFrame(rows, columns=['words','label'])

def test_text_learner(tmp_path):
    from fastai.text.all import AWD_LSTM, ColReader, TextBlock, awd_lstm_clas_config, text_classifier_learner
    blocks = TextBlock.from_df('words', tok=Words(), min_freq=1), NoisyCategoryBlock('symmetric:0.2')
    block = DataBlock(blocks, get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(seed=0))
    set_seed(0)
    dls = block.dataloaders(sentences(), bs=16, num_workers=0, path=tmp_path)
    config = {**awd_lstm_clas_config, 'emb_sz': 24, 'n_hid': 32, 'n_layers': 2}
    kwargs = dict(config=config, pretrained=False, metrics=accuracy, drop_mult=.1)
    make = lambda: quiet(text_classifier_learner(dls, AWD_LSTM, **kwargs))
    learn,cb = make(),JoCorCallback(k=3, init='all')
    with silent(): learn.fit_one_cycle(8, 1e-2, cbs=cb)
    assert learn.recorder.values[-1][2] > .75 and cb.history.label_precision.iloc[-1] > cb.history.label_precision[0]
    a,b = [m[0].module.rnns[0].weight_hh_l0_raw for m in learn.model.peers][:2]
    assert not torch.equal(a, b)
    stds = [m[0].module.encoder.weight.std() for m in make().to_peers(3, init='all', seed=1).model.peers]
    assert max(stds)/min(stds) < 1.3
    same_after_export(learn, 'so it was good', tmp_path)
    make().save_encoder('encoder')
    learn = make().load_encoder('encoder')
    learn.unfreeze()
    encoder,head = [[p.detach().clone() for p in m.parameters()] for m in learn.model]
    for i,m in enumerate(learn.to_peers(3, seed=1).model.peers):
        assert all(map(torch.equal, encoder, m[0].parameters()))
        assert i == 0 or not all(map(torch.equal, head, m[1].parameters()))

def test_tabular_learner(tmp_path):
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner
    rs = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rs.choice(list('pqr'), 600), x=rs.randn(600)))
    df['y'] = np.where((df.x > 0) ^ (df.a == 'p'), 'yes', 'no')
    to = TabularPandas(df, [Categorify,FillMissing,Normalize], ['a'], ['x'], 'y',
        y_block=NoisyCategoryBlock('symmetric:0.3'), splits=RandomSplitter(seed=0)(df))
    set_seed(0)
    learn = quiet(tabular_learner(to.dataloaders(bs=32, path=tmp_path), layers=[30], metrics=accuracy))
    cb = JoCorCallback(k=3)
    with silent(): learn.fit_one_cycle(10, 1e-2, cbs=cb)
    assert learn.recorder.values[-1][2] > .7 and cb.history.label_precision.iloc[-1] > .75
    record,frame = learn.dls.noise,cb.items.frame()
    seen = frame.given_label >= 0
    assert seen.mean() > .9 and (frame.given_label[seen] == record.noisy[seen]).all()
    same_after_export(learn, df.iloc[0], tmp_path)

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.out = nn.Linear(4,8),nn.Linear(3,8),nn.Linear(8,2)
    def forward(self, x, z): return self.out(F.relu(self.a(x)+self.b(z)))

def test_several_inputs(tmp_path):
    "One of the items is not finite"
    x,z = torch.randn(200,4),torch.randn(200,3)
    y = (x[:,0]+z[:,0] > 0).long()
    blocks = TransformBlock, TransformBlock, NoisyCategoryBlock('symmetric:0.1')
    getters = [x.__getitem__, z.__getitem__, lambda i: int(y[i])]
    block = DataBlock(blocks, n_inp=2, getters=getters, splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(range(200), bs=20, num_workers=0)
    x[dls.train_ds.items[3]] = float('nan')
    learn = quiet(Learner(dls, TwoInputs(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path))
    learn.fit(20, 3e-2, cbs=(cb := JoCorCallback(k=3)))
    assert cb.history.non_finite.tolist() == [1]*20 and finite(learn.model) and learn.validate()[1] > .7
    preds,valid = learn.get_preds()[0],list(dls.valid_ds.items)
    learn.export()
    with silent(): loaded = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(loaded.model(x[valid], z[valid]).softmax(-1), plain(preds))

# --- export

def test_export_where_the_data_are_gone(pictures, tmp_path):
    mine,item = tmp_path/'pics',tmp_path/'new.png'
    shutil.copytree(pictures, mine)
    shutil.copy(get_image_files(mine)[0], item)
    learn = picture_learner(mine, to=tmp_path)
    with silent(), learn.no_bar():
        learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
        want,peer = learn.predict(item)[2],learn.model.peers[1]
        learn.export('mean.pkl')
        single = peer.eval()(learn.dls.test_dl([item]).one_batch()[0]).softmax(-1)[0]
        learn.to_single(1).export('one.pkl')
        shutil.rmtree(mine)
        for name,probs in (('mean.pkl',want), ('one.pkl',single)):
            loaded = load_learner(tmp_path/name)
            with loaded.no_bar(): got = loaded.predict(item)[2]
            torch.testing.assert_close(torch.as_tensor(got), plain(probs), atol=1e-5, rtol=1e-4)
    assert not isinstance(loaded.model, Peers)

def test_to_single_trains_on():
    learn = digits()
    with pytest.raises(ValueError, match='single'): learn.to_single(0)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=3))
    peer = learn.model.peer(2)
    with pytest.raises(ValueError, match='i=3'): learn.to_single(3)
    learn.to_single(2).fit(1, 1e-3)
    assert learn.model is peer and len(learn.opt.param_lists[0]) == 4

MODELS = [(lambda: jocor_cnn(5, 3), (3,32,32)), (lambda: jocor_mlp(10, 64), (1,8,8))]

@pytest.mark.parametrize('make,shape', MODELS, ids=('cnn','mlp'))
def test_torch_export(make, shape):
    peers = make_peers(make, 3).eval()
    batch = torch.export.Dim('batch', min=2)
    with silent(): program = torch.export.export(peers, (torch.randn(4, *shape),), dynamic_shapes=(({0: batch},),))
    for n in (4,7):
        x = torch.randn(n, *shape)
        torch.testing.assert_close(program.module()(x), peers(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(program.module()(x).exp().sum(-1), torch.ones(n), atol=1e-5, rtol=0)

def test_onnx(tmp_path):
    pytest.importorskip('onnxscript', reason="torch's ONNX exporter (onnxscript) is not installed")
    ort = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    peers,x,file = make_peers(lambda: jocor_mlp(10,64), 3).eval(),torch.randn(4,1,8,8),tmp_path/'peers.onnx'
    with silent(): torch.onnx.export(peers, (x,), file, dynamo=True)
    session = ort.InferenceSession(str(file))
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(out), peers(x), atol=1e-5, rtol=0)
