"Data cleaned by decisions on the page of suspects, and texts and rows of tables on it."
import json, numpy as np, pandas as pd, pytest, torch
from types import SimpleNamespace
from fastai.tabular.all import Categorify, Normalize, TabularPandas, tabular_learner
from fastai.text.all import (CategoryBlock, DataBlock, IndexSplitter, ItemGetter, TextDataLoaders, TransformBlock,
                             get_image_files)
from fastai.vision.all import ImageDataLoaders, Resize
from fastai_jocor.all import JoCorCallback, write_table
from fastai_jocor.lab.show import cleaned_by_review, show_review
from learners import quiet
from pictures import digit_files
from text_learners import OTHER, reviews

COLUMNS = 'item','given_label','predicted_label','decision'

@pytest.fixture
def arrays():
    "Eight training and four validation items without names; the label of item i of a part is i%3"
    items = [(torch.tensor([float(i)]), (i%8)%3) for i in range(12)]
    block = DataBlock((TransformBlock, CategoryBlock), getters=[ItemGetter(0), ItemGetter(1)],
                      splitter=IndexSplitter(range(8, 12)))
    return block.dataloaders(items, bs=4, num_workers=0)

def frame(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(width=rng.normal(5, 1, n), colour=['red','<b>blue</b>']*(n//2), kind=['a','b','c']*(n//3)))

def rows_dls(index):
    "A table of which a third is for validation"
    df = frame().set_axis(index)
    to = TabularPandas(df, [Categorify, Normalize], ['colour'], ['width'], 'kind', CategoryBlock(),
                       splits=(list(range(40)), list(range(40, 60))))
    return to.dataloaders(bs=16)

def reviewed(folder, *rows, columns=COLUMNS):
    write_table(pd.DataFrame(rows, columns=columns), folder/'reviewed.csv', index=False)
    return folder/'reviewed.csv'

def labels(dls): return [dls.vocab[int(o[-1])] for o in dls.train_ds]
def kinds(dls): return [dls.vocab[i] for i in dls.train_ds.y]

# decisions

def test_decisions_on_other_parts_are_ignored(arrays, tmp_path):
    "Items without names are called by their positions, which each part has"
    rows = ('train',1,1,1,2,'relabel'), ('valid',2,2,2,0,'relabel'), ('valid',3,3,0,1,'drop')
    file = reviewed(tmp_path, *rows, columns=('part','position',*COLUMNS))
    assert labels(cleaned_by_review(arrays, file)) == [0,2,2,0,1,2,0,1]

def test_decisions_of_an_older_page(arrays, tmp_path):
    file = reviewed(tmp_path, (1,1,2,'relabel'), (2,2,0,'drop'), (4,1,2,'keep'), ('gone',1,2,'drop'))
    assert labels(cleaned_by_review(arrays, file)) == [0,2,0,1,2,0,1]

def test_decisions_that_were_made_already_change_nothing(arrays, tmp_path):
    file = reviewed(tmp_path, (1,1,2,'relabel'))
    once = cleaned_by_review(arrays, file)
    assert labels(cleaned_by_review(once, file)) == labels(once) == [0,2,2,0,1,2,0,1]

@pytest.mark.parametrize('decision', ('relabel','drop','keep'))
def test_decisions_on_other_labels_are_refused(decision, arrays, tmp_path):
    file = reviewed(tmp_path, (1,1,2,'relabel'), (4,2,0,decision))
    with pytest.raises(ValueError, match="'4' has the label '1', but was reviewed as '2'"):
        cleaned_by_review(arrays, file)

def test_two_decisions_on_an_item_are_refused(arrays, tmp_path):
    file = reviewed(tmp_path, (1,1,2,'relabel'), (1,1,2,'drop'))
    with pytest.raises(ValueError, match="'1' was reviewed more than once"): cleaned_by_review(arrays, file)

@pytest.mark.parametrize('row,message', [
    ((1,1,2,'delet'), "row 3: decision 'delet' for '1' must be keep, relabel or drop"),
    ((1,1,2,''), "row 3: decision '' for '1' must be"), ((1,1,'','relabel'), "row 3: predicted_label of '1' is empty")])
def test_decisions_that_mean_nothing_are_refused(row, message, arrays, tmp_path):
    file = reviewed(tmp_path, (2,2,0,'keep'), row)
    with pytest.raises(ValueError) as e: cleaned_by_review(arrays, file)
    assert f'reviewed={str(file)!r}, {message}' in str(e.value)

@pytest.mark.parametrize('gone', COLUMNS)
def test_decisions_without_a_column_are_refused(gone, arrays, tmp_path):
    file = tmp_path/'r.csv'
    write_table(pd.DataFrame([(1,1,2,'drop')], columns=COLUMNS).drop(columns=gone), file, index=False)
    with pytest.raises(ValueError, match=f"no column '{gone}'"): cleaned_by_review(arrays, file)

def test_names_that_repeat_are_told_apart_by_position(tmp_path):
    dls = rows_dls([*range(15)]*4)
    columns,before = ('position',*COLUMNS),kinds(dls)
    file = reviewed(tmp_path, (17,2,'c','a','relabel'), (2,2,'c','b','relabel'), columns=columns)
    after = kinds(cleaned_by_review(dls, file))
    assert {i: o for i,o in enumerate(after) if o != before[i]} == {2: 'b', 17: 'a'}
    for row in ((18,2,'c','a','relabel'), ('',2,'c','a','relabel')):
        with pytest.raises(ValueError, match=f"'2' is the name of 3 training items, and position='{row[0]}'"):
            cleaned_by_review(dls, reviewed(tmp_path, row, columns=columns))
    with pytest.raises(ValueError, match='position=None is none of theirs'):
        cleaned_by_review(dls, reviewed(tmp_path, (2,'c','a','relabel')))

def test_other_positions_do_not_matter_where_names_tell(tmp_path):
    dls = rows_dls([f'row{i}' for i in range(60)])
    file = reviewed(tmp_path, (0,'row5','c','a','relabel'), columns=('position',*COLUMNS))
    assert kinds(cleaned_by_review(dls, file))[:6] == ['a','b','c','a','b','a']

# what the page shows

def suspects(dls, part, position):
    "An audit without one, and a suspect for each position"
    s = pd.DataFrame(dict(part=part, position=position, item=[f'i{o}' for o in position]))
    s = s.assign(given_label='a', predicted_label='b', score=1., evidence='', p_wrong=.9)
    return SimpleNamespace(table=s, learn=SimpleNamespace(dls=dls)), s

def shown(found, s, folder):
    show_review(found, folder/'r.html', s)
    page = (folder/'r.html').read_text(encoding='utf-8')
    assert '<b>' not in page.partition('id="data">')[2].partition('</script>')[0]
    return [o['text'] for o in json.loads(page.partition('id="data">')[2].partition('</script>')[0])['rows']]

def test_rows_of_a_table(tmp_path):
    dls,df = rows_dls([*range(15)]*4),frame()
    want = lambda i: f'colour={df.colour[i]}, width={df.width[i]:.4g}'
    found,s = suspects(dls, ['valid','train'], [3,3])
    assert shown(found, s, tmp_path) == [want(43), want(3)]
    cb = JoCorCallback(k=2)
    quiet(tabular_learner(dls, layers=[4])).fit(1, cbs=cb)
    ranked = cb.ledger.assign(score=1., evidence='').loc[[17,2]]
    assert shown(cb, ranked, tmp_path) == [want(17), want(2)]

def test_texts(tmp_path):
    df = reviews(60).drop(columns='wrong')
    df.loc[7,'text'] = ' '.join(OTHER*9)
    dls = TextDataLoaders.from_df(df, path=tmp_path, text_col='text', label_col='label', seed=0, bs=16)
    names = list(dls.train_ds.items.index)
    first,cut = (shown(*suspects(dls, 'train', [names.index(i)]), tmp_path)[0] for i in (names[0], 7))
    assert first == df.text[names[0]] and len(cut) == 301 and ' '.join(OTHER*9).startswith(cut[:-1])

def test_pictures_have_no_text(tmp_path):
    files = get_image_files(digit_files(tmp_path/'p', 40))
    dls = ImageDataLoaders.from_path_func(tmp_path, files, lambda f: f.parent.name, item_tfms=Resize(32), bs=8)
    assert shown(*suspects(dls, ['train','valid'], [0,1]), tmp_path) == ['','']
