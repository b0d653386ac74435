"JoCorCallback on real learners: against a loop written out, through a learner's life, and when things go wrong."
import copy, subprocess, sys, pytest, torch
import numpy as np, pandas as pd
import torch.nn.functional as F
from contextlib import contextmanager
from fastai.vision.all import (Adam, Callback, CancelBatchException, CrossEntropyLossFlat, CutMix,
    DataBlock, DataLoader, DataLoaders, ImageBlock, L, Learner, MixUp, PILImage, RandomSplitter, ShortEpochCallback,
    accuracy, get_image_files, load_learner, nn, params, parent_label, partial, plt, resnet18, vision_learner)
from fastai.data.load import SkipItemException
from fastai_jocor.all import *
from fastai_jocor.trainer import PeersCallback
from fastai_jocor.peers import Peers
from fastai_jocor.record import Sightings
from learners import SCHEDULE, Record, Step, digits, digits64, finite, mlps64, plain, quiet, same, tensors, weights
from sync import aten, as_on_a_gpu, guard_steps
import reference

COLUMNS = ['R','kept','agreement','noise_low','noise_high','label_precision','label_recall']
OF_SCHEDULE = [o for o in COLUMNS if not o.startswith('noise')]
WEIGHT = torch.linspace(.5, 2, 10, dtype=torch.float64)

# --- against a loop

@pytest.mark.parametrize('k,weight', ((1,None), (2,None), (3,None), (3,WEIGHT)))
def test_same_weights_as_a_loop(k, weight):
    learn,rec,nets = digits64(weight),Record(),mlps64(k)
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=k, models=nets, co_lambda=.8, forget_rate=.5, **SCHEDULE)
    learn.fit(4, 1e-3, cbs=[cb, rec])
    reference.train(twins, rec.batches, [0,.5,.5,.5], 1e-3, weight=weight)
    assert len(rec.batches) == 4*len(learn.dls.train) and cb.history.R.tolist() == [0,.5,.5,.5]
    reference.assert_same_weights(learn.model.peers, twins)

def test_what_is_left_of_a_batch_goes_to_the_next():
    learn,rec,nets = digits64(bs=50),Record(),mlps64(2)
    twins,rates = copy.deepcopy(nets),[.13]*2
    cb = JoCorCallback(models=nets, forget_rate=.13, num_gradual=0)
    learn.fit(2, 1e-3, cbs=[cb, rec])
    kept = reference.train_carried(twins, rec.batches, rates, 1e-3)
    assert {len(o) for o in kept} == {43,44} and cb.history.kept.tolist() == [.87]*2
    reference.assert_same_weights(learn.model.peers, twins)

def test_the_published_rule():
    "It begins with the schedule's epoch 1, and rounds in each batch"
    learn,rec,nets = digits64(),Record(),mlps64(2)
    twins = copy.deepcopy(nets)
    cb = JoCorCallback.paper(co_lambda=.7, forget_rate=.4, num_gradual=5, models=nets)
    learn.fit(5, 1e-3, cbs=[cb, rec])
    np.testing.assert_allclose(cb.history.R, [.1,.2,.3,.4,.4])
    losses = partial(reference.joint_losses, co_lambda=.7)
    reference.train(twins, rec.batches, [.1,.2,.3,.4,.4], 1e-3, losses)
    reference.assert_same_weights(learn.model.peers, twins)

def test_figures_of_the_table():
    "Against a count by hand over the recorded batches, with nothing learned (lr 0)"
    learn,rec = digits64(),Record()
    cb = JoCorCallback(k=3, seed=1, num_gradual=0, rounding='official')
    learn.fit(1, 0., cbs=[cb,rec])
    flipped,hit,kept,clean,agree,n = learn.dls.noise.flipped,0,0,0,0,0
    for idx,(_,x,y) in zip(rec.items(learn), rec.batches):
        zs = [m(x).detach() for m in learn.model.peers]
        small = reference.smallest(reference.joint_losses(zs, y), .5)
        right = ~flipped[idx]
        hit,kept = hit+right[small].sum(),kept+len(small)
        clean,n = clean+right.sum(),n+len(y)
        votes = torch.stack(zs).argmax(-1)
        agree += int((votes == votes[0]).all(0).sum())
    row = cb.history.iloc[0][[*OF_SCHEDULE,'non_finite']].astype(float)
    np.testing.assert_allclose(row, [.5, kept/n, agree/n, hit/kept, hit/clean, 0], rtol=1e-6)

# --- the table

@pytest.mark.parametrize('rule,columns', (('evidence',COLUMNS), ('schedule',OF_SCHEDULE)))
def test_columns_and_history(rule, columns):
    learn,cb = digits(),JoCorCallback(k=2, rule=rule)
    learn.fit(2, 1e-3, cbs=cb)
    names = list(learn.recorder.metric_names)
    assert names == ['epoch','train_loss','valid_loss','accuracy',*columns,'time']
    assert all(len(v) == len(names)-2 for v in learn.recorder.values)
    assert [v[3] for v in learn.recorder.values] == cb.history.R.tolist()
    assert list(cb.history) == ['epoch',*columns,'non_finite'] and len(learn.validate()) == 2

def test_columns_where_the_truth_is_not_known():
    learn,cb = digits(noise=None),JoCorCallback(forget_rate=.2)
    learn.fit(1, cbs=cb)
    assert list(cb.history) == ['epoch','R','kept','agreement','noise_low','noise_high','non_finite']
    learn.fit(1, cbs=(cb := JoCorCallback(forget_rate=.2, rule='schedule')))
    assert list(cb.history) == ['epoch','R','kept','agreement','non_finite']

def test_the_columns_are_gone_after_the_fit():
    learn = digits()
    metrics = list(learn.metrics)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    assert list(learn.metrics) == metrics

def test_the_table_with_training_metrics():
    learn,cb = digits(),JoCorCallback(k=2)
    learn.recorder.train_metrics = True
    learn.fit(2, 1e-3, cbs=cb)
    assert all(len(v) == len(learn.recorder.metric_names)-2 for v in learn.recorder.values)
    assert len(cb.history) == 2 and 0 < cb.history.kept.iloc[0] <= 1

# --- a learner's life

def test_second_fit_keeps_peers_and_optimizer():
    learn = digits()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    model,opt = learn.model,learn.opt
    steps = {p: opt.opt.state[p]['step'].item() for p in model.parameters()}
    learn.fit_one_cycle(1, 1e-3, cbs=JoCorCallback(k=2))
    assert learn.model is model and learn.opt is opt
    assert all(opt.opt.state[p]['step'].item() == 2*steps[p] for p in model.parameters())
    with pytest.raises(ValueError, match='k=3'): learn.fit(1, cbs=JoCorCallback(k=3))

@pytest.fixture
def trained(tmp_path):
    learn = digits(path=tmp_path)
    learn.fit_one_cycle(3, 3e-3, cbs=JoCorCallback(k=3))
    return learn

def mean_probability(learn):
    "Of the validation items, by hand"
    x = plain(torch.cat([b[0] for b in learn.dls.valid]))
    return torch.stack([m.eval()(x).softmax(-1) for m in learn.model.peers]).mean(0).detach()

def test_predictions_are_the_mean_probability(trained):
    assert not any(isinstance(c, PeersCallback) for c in trained.cbs) and len(trained.cbs) == 3
    want,(preds,targs) = mean_probability(trained).cpu(),trained.get_preds()
    torch.testing.assert_close(plain(preds), want, atol=1e-5, rtol=1e-5)
    loss,acc = trained.validate()
    targs = plain(targs)
    assert acc == pytest.approx((want.argmax(-1) == targs).float().mean().item())
    assert loss == pytest.approx(F.nll_loss(want.log(), targs).item(), rel=1e-4)
    item = trained.dls.valid_ds[5][0]
    torch.testing.assert_close(trained.predict(item)[2].cpu(), want[5], atol=1e-5, rtol=1e-5)
    trained.show_results(max_n=4)

def test_save_and_load(trained):
    trained.save('peers')
    before = weights(trained.model)
    trained.fit(1, 1e-2, cbs=JoCorCallback(k=3))
    assert not same(before, weights(trained.model))
    trained.load('peers')
    assert same(before, weights(trained.model))
    assert all(isinstance(o, torch.Tensor) for o in trained.model.state_dict().values())

def test_export(trained, tmp_path):
    item = trained.dls.valid_ds[5][0]
    trained.export()
    loaded = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(loaded.predict(item)[2], trained.predict(item)[2])
    single = loaded.model.peer(1)
    assert isinstance(single, nn.Sequential) and single(torch.rand(4,1,8,8)).shape == (4,10)
    trained.fit(1, 1e-3, cbs=JoCorCallback(k=3))

def test_attached_for_good():
    learn = digits(cbs=JoCorCallback(k=2))
    single = learn.model
    assert len(learn.validate()) == 2 and learn.model is single
    learn.fit(2, 1e-3)
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape[1] == 10
    learn.fit(1, 1e-3)
    learn.remove_cb(JoCorCallback)
    assert not any(type(c).__module__.startswith('fastai_jocor') for c in learn.cbs)

def split(m): return [params(m[1]), params(m[3])]

def test_optimizer_is_carried_over():
    learn = digits(opt_func=partial(Adam, mom=.7), splitter=split)
    learn.freeze()
    learn.fit(1, slice(1e-4,1e-2), wd=.123, cbs=JoCorCallback(k=3, init='all'))
    assert [len(g) for g in learn.opt.param_lists] == [6,6] and learn.opt.frozen_idx == 1
    assert [h['lr'] for h in learn.opt.hypers] == [1e-4,1e-2]
    assert all(h['wd'] == .123 and h['mom'] == .7 for h in learn.opt.hypers)
    assert [p.requires_grad for m in learn.model.peers for p in (m[1].weight, m[3].weight)] == [False,True]*3
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())

def test_pretrained_body_is_copied():
    learn = digits(splitter=split)
    learn.freeze()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    a,b = learn.model.peers
    assert torch.equal(a[1].weight, b[1].weight) and not torch.equal(a[3].weight, b[3].weight)

def test_lr_find_leaves_no_row():
    learn = digits(cbs=(cb := JoCorCallback(k=2)))
    learn.lr_find(num_it=20, show_plot=False)
    learn.fit(1, 1e-3)
    assert cb.history.epoch.tolist() == [0]

def test_lr_find_keeps_what_was_learned_of_the_items():
    learn = digits(noise=None, cbs=(cb := JoCorCallback(k=2, forget_rate='auto', restart=True)))
    learn.fit(4, 1e-3)
    before,estimate,rows = cb.ledger,cb.estimate,cb.history
    assert estimate is not None
    learn.lr_find(num_it=15, show_plot=False)
    pd.testing.assert_frame_equal(cb.ledger, before)
    assert cb.estimate is estimate and cb.history.equals(rows)
    learn.fit(1, 1e-3)
    assert (cb.ledger.seen <= 1).all()

def test_a_callback_for_another_learner_starts_over():
    make = lambda: JoCorCallback(k=2, forget_rate=.4, num_gradual=4, seed=0)
    cb,new = make(),make()
    digits(seed=1).fit(4, 1e-3, cbs=cb)
    with pytest.warns(UserWarning, match='has trained another model'): digits().fit(3, 1e-3, cbs=cb)
    digits().fit(3, 1e-3, cbs=new)
    pd.testing.assert_frame_equal(cb.ledger, new.ledger)
    assert cb.history.R.tolist()[4:] == new.history.R.tolist()

@pytest.mark.filterwarnings('error:.*has trained another')
def test_a_callback_goes_on_with_its_own_learner():
    learn,cb = digits(),JoCorCallback(k=2, forget_rate=.4, num_gradual=4)
    for _ in range(2): learn.fit(2, 1e-3, cbs=cb)
    assert cb.history.R.is_monotonic_increasing and cb.ledger.seen.max() == 4

# --- the step

KINDS = [(1,{}), (3,{}), (3,dict(forget_rate=.5)), (3,dict(rule='schedule')), (3,dict(prune='exact')),
    (3,dict(prune='approx', refresh=2)), (3,dict(balance=.5))]

@pytest.mark.parametrize('k,kw', KINDS)
def test_the_step_does_not_synchronise(k, kw, monkeypatch):
    monkeypatch.setattr(Sightings, 'limit', 2000)
    learn,loose,seen = digits(),digits(),[]
    loose.fit(2, 1e-3, cbs=JoCorCallback(k=k, seed=1, **kw))
    as_on_a_gpu(monkeypatch, seen)
    learn.fit(2, 1e-3, cbs=(cb := JoCorCallback(k=k, seed=1, **kw)))
    at_work = aten.index_put_ if cb.by_evidence else aten.topk
    assert {aten._log_softmax.default, aten.cat.default} <= set(seen) and at_work in {o.overloadpacket for o in seen}
    assert same(weights(learn.model), weights(loose.model))

@pytest.mark.parametrize('first', (0,40)) # the first batch holds an item without a label, or does not
@pytest.mark.parametrize('kw', ({}, dict(forget_rate=.5), dict(rule='schedule', forget_rate=.5)))
def test_the_step_does_not_synchronise_where_labels_are_missing(kw, first, monkeypatch):
    monkeypatch.setattr(Sightings, 'limit', 500)
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    y[first::5] = -100
    net = nn.Linear(8,4)
    learn,loose = [tensors(x, y, copy.deepcopy(net)) for _ in range(2)]
    loose.fit(3, 1e-2, cbs=JoCorCallback(seed=1, **kw))
    as_on_a_gpu(monkeypatch, [])
    learn.fit(3, 1e-2, cbs=(cb := JoCorCallback(seed=1, **kw)))
    assert (cb.ledger.seen == 3).sum() == (y >= 0).sum()
    assert all(torch.allclose(p, q, atol=1e-6) for p,q in zip(weights(learn.model), weights(loose.model), strict=True))

def test_a_step_that_reads_a_value_is_seen(monkeypatch):
    class Reads(JoCorCallback):
        def batch_loss(self, logits, targ, R):
            logits.sum().item()
            return super().batch_loss(logits, targ, R)
    as_on_a_gpu(monkeypatch, [])
    with pytest.raises(pytest.fail.Exception, match='item inside the step'): digits().fit(1, 1e-3, cbs=Reads(k=2))

@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kw', (dict(), dict(prune='exact'), dict(prune='approx', refresh=2)))
def test_the_step_does_not_synchronise_on_a_gpu(kw, monkeypatch):
    guard_steps(monkeypatch, no_waiting, first=1)
    digits().fit(3, 1e-3, cbs=JoCorCallback(k=3, **kw))

def test_autocast_in_bfloat16():
    learn,dtypes = digits(),[]
    class See(Callback):
        order,run_valid = -20,False
        def after_pred(self): dtypes.append(self.pred.dtype)
        def after_backward(self): dtypes.append(self.learn.loss_grad.dtype)
    learn.fit(10, 1e-2, cbs=[JoCorCallback(k=2), AutocastBF16(), See()])
    assert set(dtypes[::2]) == {torch.bfloat16} and set(dtypes[1::2]) == {torch.float32}
    assert learn.recorder.values[-1][2] > .4
    assert next(learn.model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled('cpu')

# --- faults

class Stop(Callback):
    "Raise in an event of the third batch of the second epoch"
    def __init__(self, event, exc):
        self.exc = exc
        setattr(self, event, self.stop)
    def stop(self):
        if getattr(self, 'training', False) and self.epoch==1 and self.iter==2: raise self.exc

class NoGradientAtFirst(Callback):
    "The gradients of an interrupted batch are not carried into the next fit"
    def before_batch(self):
        if not self.training or self.epoch or self.iter: return
        assert all(p.grad is None or (p.grad == 0).all() for p in self.model.parameters())

EVENTS = 'before_batch','after_pred','after_loss','after_backward','before_step','after_batch'

@pytest.mark.parametrize('exc', (KeyboardInterrupt(), RuntimeError('a fault elsewhere')))
@pytest.mark.parametrize('event', EVENTS)
def test_interrupted_fit(event, exc):
    learn = digits()
    lf,cbs,logger,metrics = learn.loss_func,list(learn.cbs),learn.logger,list(learn.metrics)
    with pytest.raises(type(exc)): learn.fit(3, 1e-3, cbs=[JoCorCallback(k=2), Stop(event, exc)])
    assert learn.loss_func is lf and list(learn.cbs) == cbs and learn.logger is logger
    assert list(learn.metrics) == metrics
    assert len(learn.validate()) == 2
    assert learn.get_preds()[0].shape[1] == 10
    assert event != 'before_step' or any((p.grad != 0).any() for p in learn.model.parameters())
    cb = JoCorCallback(k=2)
    learn.fit(2, 1e-3, cbs=[cb, NoGradientAtFirst()])
    assert len(cb.history) == 2 and finite(learn.model)

def test_an_interrupted_learner_can_be_exported(tmp_path):
    learn = digits(cbs=JoCorCallback(k=2), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-3, cbs=Stop('after_loss', KeyboardInterrupt()))
    learn.export()
    assert load_learner(tmp_path/'export.pkl').model.k == 2
    learn.fit(1, 1e-3)

class Odd(nn.Module):
    "A model that cannot draw new weights"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64,10))
    def forward(self, x): return x.flatten(1) @ self.w

def test_a_model_that_cannot_be_made_anew_is_refused():
    odd = quiet(Learner(digits_dls(), Odd()))
    model = odd.model
    with pytest.raises(ValueError, match='[Pp]ass a factory'): odd.fit(1, cbs=JoCorCallback(forget_rate=.2))
    assert odd.model is model
    odd.fit(1, cbs=JoCorCallback(forget_rate=.2, models=Odd))
    assert odd.model.k == 2

def test_a_refused_fit_changes_nothing():
    learn = digits(noise=None, splitter=lambda m: [[p] for p in m.parameters()])
    learn.create_opt()
    model,opt,splitter,n,metrics = learn.model,learn.opt,learn.splitter,len(learn.cbs),list(learn.metrics)
    before = weights(model)
    fewer = [jocor_mlp(10, 64), nn.Sequential(nn.Flatten(), nn.Linear(64,10))]
    with pytest.raises(ValueError, match='parameter groups'):
        learn.fit(1, cbs=JoCorCallback(k=2, forget_rate=.1, models=fewer))
    assert (learn.model,learn.opt,learn.splitter,len(learn.cbs)) == (model,opt,splitter,n)
    assert same(before, weights(model)) and list(learn.metrics) == metrics

BAD_ARGUMENTS = [
    (dict(k=0), 'k=0'), (dict(k=2.5), 'k=2.5'), (dict(k='3'), "k='3'"), (dict(k=True), 'k=True'),
    (dict(contrast='js'), "contrast='js'"), (dict(contrast=['kl']), 'contrast='),
    (dict(co_lambda=1.2), 'co_lambda=1.2'), (dict(co_lambda='0.5'), "co_lambda='0.5'"),
    (dict(rule='paper'), "rule='paper'"), (dict(without=('margn',)), "without='margn'"),
    (dict(rule='evidence', balance=.5), 'balance=0.5 is an argument of rule=.schedule'),
    (dict(rounding='up'), "rounding='up'"), (dict(first_epoch=-1), 'first_epoch=-1'),
    (dict(forget_rate=1.), 'forget_rate=1.0'), (dict(forget_rate=-.1), 'forget_rate=-0.1'),
    (dict(forget_rate='0.2'), "forget_rate='0.2'"),
    (dict(num_gradual=-1), 'num_gradual=-1'), (dict(num_gradual=2.5), 'num_gradual=2.5'),
    (dict(exponent=0.), 'exponent=0.0'), (dict(exponent=float('nan')), 'exponent=nan'),
    (dict(seed=-1), 'seed=-1'), (dict(init='body'), "init='body'"), (dict(select='all'), "select='all'")]

@pytest.mark.parametrize('kw,msg', BAD_ARGUMENTS)
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): JoCorCallback(**kw)

def cells(y, model=None, loss=None, n=96, **kwargs):
    "A learner on n items of eight numbers"
    return tensors(torch.randn(n,8), y, model or nn.Linear(8,4), loss_func=loss, **kwargs)

BAD_TARGETS = [(torch.rand(96), 'class indices'), (torch.randint(0,2,(96,3)), 'class indices'),
    (torch.randint(4,9,(96,)), r'must lie in \[0, 4\)')]

@pytest.mark.parametrize('y,msg', BAD_TARGETS)
def test_bad_targets(y, msg):
    learn = cells(y, shuffle=True)
    model = learn.model
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(forget_rate=.1))
    assert learn.model is model

@pytest.mark.parametrize('wrong', (-101, -1, 4))
def test_a_bad_target_in_a_later_batch(wrong):
    y = torch.randint(0,4,(96,))
    y[90] = wrong
    learn = cells(y)
    model,msg = learn.model,rf'1 of the 96 training labels lie outside \[0, 4\), such as {wrong} at position 90'
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(forget_rate=.1))
    assert learn.model is model
    y[90] = 0
    learn.dls = cells(y).dls
    learn.fit(1, cbs=JoCorCallback(forget_rate=.1))

RULES = pytest.mark.parametrize('kw', (dict(), dict(rule='schedule')), ids=('evidence','schedule'))

@RULES
def test_items_without_a_label_take_no_place(kw):
    "The label that cross-entropy ignores: the same weights and ledger as without them"
    found,x,y = [],torch.randn(96,8),torch.randint(0,4,(96,))
    none = torch.arange(96) % 3 == 0
    y[none] = -100
    nets = [nn.Linear(8,4) for _ in range(2)]
    learn = tensors(x, y, nn.Linear(8,4))
    cb = JoCorCallback(forget_rate=.25, models=copy.deepcopy(nets), co_lambda=.5, **kw)
    learn.fit(3, 1e-2, cbs=cb)
    assert (cb.items.seen[none] == 0).all() and (cb.items.seen[~none] == 3).all()
    assert cb.history.kept.between(.7, 1).all() and cb.ledger.given_label[~none.numpy()].between(0, 3).all()
    assert finite(learn.model) and not same(weights(nn.ModuleList(nets)), weights(learn.model.peers))
    if not kw: return
    twins,(x,y) = copy.deepcopy(nets),(x[~none],y[~none])
    at = torch.arange(96)[~none]//32
    batches = [(e, x[at == i], y[at == i]) for e in range(3) for i in range(3)]
    losses = partial(reference.joint_losses, co_lambda=.5)
    reference.train_carried(twins, batches, cb.history.R.tolist(), 1e-2, losses)
    reference.assert_same_weights(learn.model.peers, twins, atol=1e-4)

def test_bad_loss_and_model():
    y = torch.randint(0,4,(96,))
    with pytest.raises(ValueError, match='cannot be reduced per sample'):
        cells(y, loss=lambda z,y: F.cross_entropy(z,y)).fit(1, cbs=JoCorCallback(forget_rate=.1))
    square = nn.Sequential(nn.Linear(8,4), nn.Unflatten(1,(2,2)))
    with pytest.raises(ValueError, match=r'logits of shape \(N, C\)'):
        cells(y, square).fit(1, cbs=JoCorCallback(forget_rate=.1))

def test_a_loader_without_a_batch():
    dls = digits_dls(bs=5000)
    assert len(dls.train) == 1
    dls.train.drop_last = True
    with pytest.raises(ValueError, match='yields no batch'):
        quiet(Learner(dls, jocor_mlp(10,64))).fit(1, cbs=JoCorCallback(forget_rate=.1))

def test_torch_loaders():
    items = list(zip(torch.randn(96,8), torch.randint(0,4,(96,))))
    dl = torch.utils.data.DataLoader(items, batch_size=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.25)))
    assert len(cb.history) == 2 and len(learn.validate()) == 1

@pytest.mark.parametrize('mix', (MixUp, CutMix))
def test_mixing_is_refused(mix):
    learn = digits()
    model = learn.model
    with pytest.raises(ValueError, match=f'{mix.__name__} mixes'): learn.fit(1, cbs=[mix(), JoCorCallback(k=2)])
    assert learn.model is model and isinstance(learn.loss_func, CrossEntropyLossFlat)

@pytest.mark.parametrize('other', (JoCorCallback, CoTeachingCallback))
def test_two_methods_at_once_are_refused(other):
    learn = digits(cbs=other(k=2))
    model,name = learn.model,other.__name__
    with pytest.raises(ValueError, match=f'has a {name} beside this|has a JoCorCallback beside this {name}'):
        learn.fit(1, cbs=JoCorCallback(k=2))
    assert learn.model is model
    learn.fit(1, 1e-3)

# --- random states

def test_trying_a_batch_leaves_the_random_states_alone():
    a,b = Record(),Record()
    digits().fit(1, 1e-3, cbs=[JoCorCallback(k=2, seed=0), a])
    digits().fit(1, 1e-3, cbs=b)
    assert all(torch.equal(p[1], q[1]) for p,q in zip(a.batches, b.batches))

def test_same_seed_same_weights():
    found = []
    for _ in range(2):
        learn = digits(seed=5)
        learn.fit_one_cycle(2, 1e-3, cbs=JoCorCallback(k=3))
        found.append(weights(learn.model))
    assert same(*found)

# --- data

def test_image_folder_with_a_small_resnet(tmp_path):
    "A `vision_learner`'s model on files through a `DataBlock`, two workers, corrupted labels"
    from sklearn.datasets import load_digits
    d = load_digits()
    for i,(im,t) in enumerate(zip(d.images[:160], d.target[:160])):
        (tmp_path/str(t)).mkdir(exist_ok=True)
        pixels = np.repeat((im*15).astype(np.uint8)[...,None], 3, -1)
        PILImage.create(pixels).resize((32,32)).save(tmp_path/str(t)/f'{i}.png')
    blocks = ImageBlock, NoisyCategoryBlock(Symmetric(.3))
    block = DataBlock(blocks, get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.2, seed=0))
    dls = block.dataloaders(tmp_path, bs=32, num_workers=2)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    cb = JoCorCallback(k=2)
    learn.fit_one_cycle(2, 1e-3, cbs=cb)
    n = [len(L(params(m))) for m in learn.model.peers]
    assert sum(len(g) for g in learn.opt.param_lists) == sum(n) and len(learn.opt.param_lists) == 3
    assert cb.history.label_precision.between(0,1).all() and cb.history.noise_high.between(0,1).all()
    learn.export()
    probs = load_learner(tmp_path/'export.pkl').predict(get_image_files(tmp_path)[0])[2]
    assert probs.sum() == pytest.approx(1, abs=1e-5)

class ToDouble(Callback):
    order = 15
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)

def test_a_model_that_needs_another_callback_on_its_batches():
    learn = digits(cbs=ToDouble())
    learn.model.double()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    assert all(p.dtype == torch.float64 for p in learn.model.parameters()) and finite(learn.model)
    learn = digits(cbs=ToDouble(), loss_func=lambda z,y: z.mean())
    learn.model.double()
    with pytest.raises(ValueError, match='cannot be reduced per sample'): learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))

class Two(nn.Module):
    "A model of two inputs"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(9,4)
    def forward(self, x, z): return self.l(torch.cat([x, z[:,None]], 1))

def test_a_missing_number_among_the_inputs():
    x,z,y = torch.randn(96,8),torch.randn(96),torch.randint(0,4,(96,))
    z[[3,40]] = float('nan')
    dl = DataLoader(list(zip(x, z, y)), bs=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl, dl), Two(), loss_func=CrossEntropyLossFlat()))
    learn.dls.n_inp = 2
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.1, models=Two)))
    assert cb.history.non_finite.tolist() == [2,2] and finite(learn.model)

class SomeItems:
    "A data set some of whose items cannot be read"
    def __init__(self, bad, n): self.bad,self.x,self.y = bad,torch.randn(n,8),torch.randint(0,4,(n,))
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException()
        return self.x[i],self.y[i]

def skipping(bad, n=96, **kwargs):
    dls = DataLoaders(DataLoader(SomeItems(bad, n), bs=32, shuffle=True, **kwargs), DataLoader(SomeItems((), n), bs=32))
    return quiet(Learner(dls, nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('kw', ({}, dict(drop_last=True), dict(num_workers=2)))
@pytest.mark.parametrize('bad', ((5,),(0,50,89)))
def test_items_that_a_loader_leaves_out(bad, kw):
    learn,any_of = skipping(bad, 90, **kw),'|'.join(map(str, bad))
    with pytest.raises(ValueError, match=f'skips item ({any_of}),'):
        learn.fit(2, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert not {'do_item','get_idxs'} & set(vars(learn.dls.train))

@pytest.mark.parametrize('n,drop_last', ((96,False),(90,False),(90,True),(20,False)))
def test_items_that_are_all_there(n, drop_last):
    learn = skipping((), n, drop_last=drop_last)
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.1)))
    assert len(cb.history) == 2

def test_an_epoch_that_was_cut_short():
    learn = digits()
    learn.fit(2, 1e-3, cbs=[ShortEpochCallback(pct=.3), cb := JoCorCallback(k=2)])
    assert len(cb.history) == 2

def test_a_last_batch_that_was_cancelled():
    class Cancel(Callback):
        order = -9
        def before_batch(self):
            if self.training and self.iter == self.n_iter-1: raise CancelBatchException()
    learn = digits()
    learn.fit(2, 1e-3, cbs=[Cancel(), cb := JoCorCallback(k=2)])
    assert len(cb.history) == 2

SPAWN = """
import multiprocessing
from fastai.vision.all import *
from fastai_jocor.all import *
class Items:
    def __len__(self): return 90
    def __getitem__(self, i): return torch.full((8,), i/90), torch.tensor(i%4)
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    dls = DataLoaders(DataLoader(Items(), bs=32, shuffle=True, num_workers=2), DataLoader(Items(), bs=32))
    learn = Learner(dls, nn.Linear(8,4), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.fit(1, cbs=(cb := JoCorCallback(k=2, forget_rate=.1)))
    assert cb.ledger.seen.tolist() == [1]*90 and cb.items.given_label.tolist() == [i%4 for i in range(90)]
"""

def test_loader_processes_that_are_not_forked(tmp_path):
    (tmp_path/'train.py').write_text(SPAWN)
    p = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'train.py'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
