"Configurations of runs, methods, and grids in YAML."
import pytest
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.methods import CoTeachingCallback
from fastai_jocor.lab.config import Method, RunConfig, methods
from fastai_jocor.lab.grid import check_grid
from fastai_jocor.lab.results import finished, run_dir
from fastai_jocor.lab.spec import read_grid
from lab_helpers import RESULTS, ROOT

def test_grids_of_the_project():
    cfgs = read_grid('digits')
    assert len(cfgs) == 720 and len(check_grid(cfgs, 'x')) == 720
    assert [c.seed for c in cfgs] == sorted(c.seed for c in cfgs)
    names = ['standard','co_teaching k=2','co_teaching_plus k=2','forward','sce','jocor k=1','jocor k=2','jocor k=3',
             'jocor k=3 kl_circular','jocor k=5 ce_circular']
    assert {c.name for c in cfgs} >= set(names)
    cfgs = read_grid('mnist_protocol')
    assert [c.seed for c in cfgs] == sorted(c.seed for c in cfgs)
    assert {c.noise for c in cfgs[:24]} == {'symmetric:0.2','symmetric:0.5','symmetric:0.8','asymmetric:0.4'}
    assert {(c.dataset,c.epochs,c.bs,c.lr,c.schedule) for c in cfgs} == {('mnist',200,128,1e-3,'paper')}

def test_grid_from_a_file(tmp_path):
    runs = 'runs:\n  - method: standard\n  - {k: [2, 3]}\n'
    (tmp_path/'g.yaml').write_text('epochs: 2\nlr: 1e-2\nseed: [0-1, 5]\n' + runs)
    cfgs = read_grid(tmp_path/'g.yaml')
    names = ('standard','jocor k=2','jocor k=3')
    assert [(c.seed,c.name) for c in cfgs] == [(s,n) for s in (0,1,5) for n in names] and {c.lr for c in cfgs} == {1e-2}
    cfgs = read_grid(tmp_path/'g.yaml', seed='7', noise='none, pairflip:0.2', method='jocor', k='2')
    assert [(c.seed,c.noise,c.name) for c in cfgs] == [(7,'none','jocor k=2'), (7,'pairflip:0.2','jocor k=2')]

def test_a_method_is_chosen_among_the_runs_of_a_grid():
    def names(file, **over):
        return [(c.seed,c.noise,c.name,c.co_lambda) for c in read_grid(file, **over)]
    for file in ('mnist_protocol','digits'):
        every = names(file)
        for m in ('standard','jocor','co_teaching'):
            assert names(file, method=m) == [o for o in every if o[2].split()[0] == m]
    there = "method='sce' is in none of the runs of the grid, which are of standard, jocor, co_teaching, co_t"
    with pytest.raises(ValueError, match=there): names('mnist_protocol', method='sce')
    with pytest.raises(ValueError, match="mnist_protocol.yaml: method='jocr' is unknown: did you mean 'jocor'"):
        names('mnist_protocol', method='jocr')
    with pytest.raises(ValueError, match="^seed='3-1'"): read_grid(None, seed='3-1')

class Timid(JoCorCallback):
    "Keep a little more than JoCoR does"
    def __init__(self, shy=.5, **kwargs):
        super().__init__(**kwargs)
        self.shy = shy

def test_a_method_in_one_line(monkeypatch):
    monkeypatch.setitem(methods, 'timid', Method(Timid))
    cfg = RunConfig(method='timid', k=3, epochs=3, options=dict(shy=.25, exponent=2.))
    assert cfg.name == 'timid k=3 exponent=2.0 shy=0.25' and (cfg.callback().shy, cfg.callback().exponent) == (.25,2.)
    assert run_dir('', cfg).name == 'digits-symmetric0.5-timid_k3_exponent2.0_shy0.25-epochs3-seed0'
    with pytest.raises(ValueError, match="do not fit method='timid'.*'shi'"):
        RunConfig(method='timid', options=dict(shi=1))

def test_an_error_names_nothing_that_was_not_set(monkeypatch):
    with pytest.raises(ValueError, match="^augment='crop_flip' is for") as e: RunConfig(augment='crop_flip')
    assert 'subset' not in str(e.value)
    with pytest.raises(ValueError, match='^subset=0.5 is for') as e: RunConfig(subset=.5)
    assert 'augment' not in str(e.value)
    monkeypatch.setitem(methods, 'mine', Method(CoTeachingCallback))
    says = r"method='mine' is registered with .* 'co_lambda'.*fields=\('k', 'forget_rate', 'contrast', 'num_gradual'\)"
    with pytest.raises(ValueError, match=says) as e: RunConfig(method='mine')
    assert 'options' not in str(e.value)

def test_fields_that_a_method_does_not_take_play_no_part(monkeypatch):
    monkeypatch.setitem(methods, 'narrow', Method(Timid, ('k','forget_rate')))
    assert RunConfig(method='narrow', contrast='ce', co_lambda=.2).plain() == RunConfig(method='narrow').plain()
    assert RunConfig(method='narrow', k=3).plain() != RunConfig(method='narrow').plain()
    assert RunConfig(method='standard', k=5, forget_rate=.3).plain() == RunConfig(method='standard', k=1)

def test_clean_labels_drop_nothing():
    assert RunConfig(noise='none').callback().forget_rate == 0 and RunConfig().callback().forget_rate is None
    assert RunConfig(noise='none', schedule='one_cycle').callback().forget_rate is None # found in training

BY_SCHEDULE = dict(schedule='paper'), dict(num_gradual=10), dict(options=dict(balance=.5)), dict(rule='schedule')

@pytest.mark.parametrize('kw', BY_SCHEDULE)
def test_runs_that_go_by_a_schedule(kw):
    cfg = RunConfig(**{'schedule': 'one_cycle', **kw})
    cb,paper = cfg.callback(),cfg.schedule == 'paper'
    assert (cb.rule, cb.rounding, cb.first_epoch) == ('schedule', 'official', int(paper))
    assert cfg.plain() == RunConfig(**{'schedule': 'one_cycle', 'co_lambda': .8, **kw}).plain()

def test_runs_without_a_schedule():
    cfg = RunConfig(schedule='one_cycle')
    assert cfg.callback().rule != 'schedule' and cfg.callback().co_lambda is None
    assert cfg.plain() == RunConfig(schedule='one_cycle', rule='evidence').plain()
    assert cfg.plain() != RunConfig(schedule='one_cycle', co_lambda=.8).plain()
    assert run_dir('', cfg) != run_dir('', RunConfig(schedule='one_cycle', rule='schedule'))
    with pytest.raises(ValueError, match='num_gradual=5 is an argument of'): RunConfig(rule='evidence', num_gradual=5)
    teaching = RunConfig(method='co_teaching').callback()
    assert (teaching.rounding, teaching.first_epoch) == ('official',1)

GRIDS = dict(digits='digits_grid', digits_lambda='digits_lambda',
    mnist_lambda_tau='mnist_lambda_tau', mnist_protocol='mnist_protocol', mnist_default='mnist_default',
    plain_sum='plain_sum', prune_mnist='prune')

@pytest.mark.parametrize('grid', GRIDS)
def test_kept_results_belong_to_the_grids(grid):
    folder = RESULTS/GRIDS[grid]
    if not folder.exists(): pytest.skip('no results are kept')
    cfgs = read_grid(grid)
    assert sum(finished(run_dir(folder, c), c) is not None for c in cfgs) > .5*len(cfgs)

def test_names_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setitem(methods, 'any', Method(lambda **options: JoCorCallback()))
    a,b = (RunConfig(method='any', options=dict(watch=list(range(n)))) for n in (100,101))
    assert len(run_dir('', a).name) <= 200 and run_dir('', a) != run_dir('', b)
