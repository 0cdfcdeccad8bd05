"""The page itself, in a real browser and both renderers: the panels show a run live and again after
a reload. Screenshots land in E2E_OUTPUT, when it is set.
"""

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("panels")]
PANEL_HEIGHTS = """() => [...document.querySelectorAll('.cntlora-panel')].map((e) =>
    Math.round(e.getBoundingClientRect().height))"""
SAMPLED_STEPS = (
    "() => [...document.querySelectorAll('.cntlora-sample')].map((e) => +e.dataset.step)"
)
# Pictures on the train node that are not in its panel.
PICTURES_OUTSIDE = """() => {
    const train = window.app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain');
    const vue = document.querySelector(`[data-node-id="${train.id}"]`);
    const images = [...(vue?.querySelectorAll('img') ?? [])];
    return (train.imgs ?? []).length
        + images.filter((image) => !image.closest('.cntlora-panel')).length;
}"""
ANSWER_LATE = """(ms) => {
    const { api } = window.app;
    const fetchApi = api.fetchApi.bind(api);
    api.fetchApi = async (address, ...values) => {
        const answer = await fetchApi(address, ...values);
        const ours = address.startsWith('/cntlora/events');
        await new Promise((resolve) => setTimeout(resolve, ours ? ms : 0));
        return answer;
    };
}"""
# Events of a run of a node, as the server tells them: of this page, or of another `client`.
TELL = """([kind, run, type, said, client]) => {
    const { graph, api } = window.app;
    const node = graph.nodes.find((n) => n.comfyClass === kind);
    const own = { run, client: client ?? api.clientId };
    const begun = { ...own, seq: 1, type: 'run', folder: '', steps: 9, started: 1 };
    const events = said.map((text, n) => ({ ...own, seq: n + 2, type, text }));
    const source = { workflow: graph.id ?? '', node: node.id, class: kind };
    const detail = { ...source, client: own.client, events: [begun, ...events] };
    api.dispatchEvent(new CustomEvent('cntlora.event', { detail }));
}"""
UNDO = """async () => {
    const { app } = window;
    const node = app.graph.nodes.find((n) => n.comfyClass === 'CNTLoRATrain');
    node.pos = [node.pos[0] + 40, node.pos[1]];
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
    await app.extensionManager.command.execute('Comfy.Undo');
}"""
INTO_A_SUBGRAPH = """() => {
    const ours = ['CNTLoRATrain', 'CNTLoRACalibrate'];
    const chosen = window.app.graph.nodes.filter((n) => ours.includes(n.comfyClass));
    const { node } = window.app.graph.convertToSubgraph(new Set(chosen));
    setTimeout(() => window.app.canvas.openSubgraph(node.subgraph, node), 100);
}"""
# Whether a sentence stands beside the graph.
BESIDE = """(said) => [...document.querySelectorAll('body *')].some((e) => !e.children.length
    && !e.closest('.cntlora-panel') && e.textContent.includes(said))"""
# Of the map: those of the layers that always have a rank, and those of convolutions alone.
ATTENTION_ROWS = ("down 1.0", "down 2.0", "mid", "up 0.0", "up 0.1", "up 1.0", "up 1.1")
CONVOLUTION_ROWS = ("down 0.0", "mid 1", "up 2.0", "up 2.1")
SHORT = {"steps": 8, "sample_every": 8, "validate_every": 4, "effort": "quick"}


def test_the_panel_lives_and_survives_a_reload(page):
    page.open_example("train_a_subject")
    page.shot("before")
    page.run(steps=40, sample_every=20, effort="quick")
    page.page.wait_for_selector(".cntlora-chart canvas", timeout=90_000)
    page.page.wait_for_function(
        f"() => /step [1-9]\\d?\\/40/.test(({page.TEXTS})('numbers').join())", timeout=120_000
    )
    page.shot("during")
    page.reload()
    page.page.wait_for_selector(".cntlora-chart canvas", timeout=60_000)
    page.page.wait_for_timeout(1000)
    assert "/40" in " ".join(page.texts("numbers"))
    assert "6 pictures" in " ".join(page.texts("text"))
    page.shot("reloaded")
    page.wait_for("headline", "^Done$", 240)
    steps = page.evaluate(SAMPLED_STEPS)
    assert steps == sorted({*steps, 0, 20, 40})  # and those of the best weights
    assert page.page.locator(".cntlora-kept").count() == 1
    rows = page.page.locator(".cntlora-map tbody th").all_text_contents()
    assert set(ATTENTION_ROWS) <= set(rows) <= {*ATTENTION_ROWS, *CONVOLUTION_ROWS}
    assert len(set(rows)) == len(rows)
    cells = page.page.locator(".cntlora-map tbody td").all_text_contents()
    assert f"· {sum(map(bool, cells))} layers" in " ".join(page.texts("numbers"))
    assert page.evaluate(
        """() => {
            const map = document.querySelector('.cntlora-map');
            return map.scrollWidth <= map.clientWidth;
        }"""
    )
    page.page.wait_for_timeout(500)
    page.shot("after")


def test_every_warning_of_a_run_can_be_read(page):
    page.open_example("train_a_subject")
    said = ["No captions were found.", "A prior is connected for nothing. " * 9, "One picture."]
    page.evaluate(TELL, ["CNTLoRATrain", "a", "warning", said, None])
    assert page.texts("notice") == said
    notices = page.page.get_by_role("log", name="Warnings").filter(has_text="One picture.")
    notices.evaluate("(e) => e.scrollTo(0, e.scrollHeight)")
    assert notices.evaluate("(e) => e.scrollTop > 0 && e.clientHeight > 40")
    page.shot("warnings")


def test_the_panels_outlive_an_undo(page):
    page.open_example("train_a_subject")
    before = page.evaluate(PANEL_HEIGHTS)
    page.evaluate(UNDO)
    page.page.wait_for_timeout(1500)
    assert page.evaluate(PANEL_HEIGHTS) == before
    page.evaluate(TELL, ["CNTLoRATrain", "b", "status", ["told after the undo"], None])
    assert "told after the undo" in page.texts("headline")


def test_another_page_with_the_file_open_leaves_this_pages_run_alone(page):
    page.open_example("train_a_subject")
    page.evaluate(TELL, ["CNTLoRATrain", "c", "status", ["of another page"], "another"])
    assert "of another page" in page.texts("headline")  # nothing of its own yet
    page.evaluate(TELL, ["CNTLoRATrain", "d", "status", ["of this page"], None])
    page.evaluate(TELL, ["CNTLoRATrain", "e", "status", ["later, of another page"], "another"])
    assert "of this page" in page.texts("headline")


def test_a_notice_of_a_node_without_a_panel_stands_beside_the_graph(page):
    page.open_example("train_a_subject")
    said = "Is it a v-prediction model? Set prediction."
    page.evaluate(TELL, ["CNTLoRALoadCheckpoint", "a", "warning", ["Of others."], "another"])
    page.evaluate(TELL, ["CNTLoRALoadCheckpoint", "b", "warning", [said], None])
    page.page.wait_for_function(BESIDE, arg=said, timeout=5000)
    assert not page.evaluate(BESIDE, "Of others.")
    page.page.wait_for_timeout(500)
    page.shot("notice")
    page.reload()  # it stays until somebody closes it


def test_two_train_nodes_each_show_their_own_run(page):
    page.open_example("compare_starts")
    page.run(**SHORT)
    page.wait_for("headline", "^Done$", 180)
    trained = [numbers for numbers in page.texts("numbers") if "step 8/8" in numbers]
    assert len(trained) == 2
    assert trained[0] != trained[1]  # the ordinary start has other losses
    page.shot("two_runs")


def test_the_panel_in_a_subgraph(page):
    page.open_example("train_a_subject")
    page.evaluate(INTO_A_SUBGRAPH)
    page.page.wait_for_timeout(1000)
    page.run(**SHORT)
    page.wait_for("headline", "^Done$")
    assert "step 8/8" in " ".join(page.texts("numbers"))
    page.page.wait_for_timeout(500)
    page.shot("subgraph")


def test_what_is_put_into_a_subgraph_after_its_run_still_shows_it(page):
    page.open_example("train_a_subject")
    page.run(**SHORT)
    page.wait_for("headline", "^Done$")
    page.evaluate(INTO_A_SUBGRAPH)
    page.page.wait_for_timeout(1000)
    page.wait_for("headline", "^Done$", 10)
    assert "step 8/8" in " ".join(page.texts("numbers"))
    assert page.page.locator(".cntlora-sample").count() >= 2
    page.shot("into_a_subgraph")


def test_a_run_belongs_to_its_workflow_and_the_cache_brings_it_to_others(page):
    page.open_example("train_a_subject")
    page.run(**SHORT)
    page.wait_for("headline", "^Done$")
    page.wait_for("text", "6 pictures|^Saved as", 60)
    assert page.evaluate(PICTURES_OUTSIDE) == 0
    first = page.graph()
    # another tab with the same node ids
    other = {key: value for key, value in first.items() if key != "id"}
    page.open_graph(other)
    page.wait_for("headline", "^Press Run", 10)
    page.open_graph(first)
    page.wait_for("headline", "^Done$", 10)
    page.open_graph(other)
    page.run_again()
    page.wait_for("headline", "^Done$", 60)
    assert page.page.locator(".cntlora-sample").count() >= 2
    words = " ".join(page.texts("text"))
    assert "6 pictures, shorter sides 64-64 px. Prompt: 'a sks cat face emoji'" in words
    assert "Saved as my_subject" in words
    page.shot("cached")
    # what is read for a graph that is left comes to no other
    page.evaluate(ANSWER_LATE, 4000)
    page.open_graph(first)
    page.open_graph(other)
    page.page.wait_for_timeout(5000)
    page.wait_for("headline", "^Press Run", 10)
    page.reload()


def test_the_properties_panel_leaves_the_panel_in_its_node(page):
    page.open_example("train_a_subject")
    before = page.evaluate(PANEL_HEIGHTS)
    toggle = page.page.get_by_role("button", name="Toggle properties panel")
    if not toggle.count():
        pytest.skip("this frontend has no properties panel")
    toggle.first.click()
    for kind in ("CNTLoRATrain", "CNTLoRACalibrate"):
        page.evaluate(
            """(kind) => {
                const node = window.app.graph.nodes.find((n) => n.comfyClass === kind);
                window.app.canvas.selectItems([node]);
            }""",
            kind,
        )
        page.page.wait_for_timeout(700)
    page.shot("properties")
    page.evaluate("() => window.app.canvas.deselectAll()")
    page.page.wait_for_timeout(700)
    assert page.evaluate(PANEL_HEIGHTS) == before
    close = page.page.get_by_role("button", name="Toggle properties panel")
    close.first.click()


def test_a_wrong_input_is_a_red_node_with_a_sentence(page):
    page.open_example("train_a_subject")
    page.evaluate(
        """() => {
            const subject = window.app.graph.nodes.find(
                (n) => n.comfyClass === 'CNTLoRASubjectImages');
            subject.widgets.find((w) => w.name === 'folder').value = '../../etc';
            window.app.queuePrompt(0);
        }"""
    )
    said = "is not a name inside 'input'"
    page.page.wait_for_function(
        "(said) => JSON.stringify(window.app.lastNodeErrors ?? {}).includes(said)",
        arg=said,
        timeout=20_000,
    )
    if page.frontend < (1, 36):  # it does not tell when a prompt is sent, but says why in a dialog
        page.page.get_by_role("dialog").get_by_text(said).first.wait_for(timeout=20_000)
        page.shot("red_node")
        page.page.keyboard.press("Escape")
        return
    page.page.wait_for_function(
        "(said) => document.querySelector('.cntlora-text.cntlora-failed')?.innerText.match(said)",
        arg=said,
        timeout=10_000,
    )
    page.page.wait_for_function(BESIDE, arg=said, timeout=10_000)
    page.shot("red_node")


def test_what_runs_in_another_tab_says_nothing_here_and_is_read_on_return(page):
    page.open_example("train_a_subject")
    first = page.graph()
    page.run(**SHORT)
    page.wait_for("headline", "Training|Calibrating|encoding|^Done", 60)
    page.open_graph({key: value for key, value in first.items() if key != "id"})
    page.wait_until_idle()
    page.page.wait_for_timeout(1000)
    page.wait_for("headline", "^Press Run", 10)
    page.wait_for("text", "^After a run", 10)
    page.open_graph(first)
    page.wait_for("headline", "^Done$", 10)
    page.wait_for("text", "6 pictures|^Saved as", 10)


def test_what_was_missed_while_the_server_was_away_is_read(page):
    page.open_example("train_a_subject")
    page.run(**SHORT)
    page.wait_for("headline", "^Done$")
    page.wait_until_idle()
    page.evaluate(
        """() => { for (const line of document.querySelectorAll('.cntlora-headline'))
            line.textContent = 'step 3 of 8'; }"""
    )
    page.evaluate("() => window.app.api.dispatchEvent(new CustomEvent('reconnected'))")
    page.wait_for("headline", "^Done$", 10)


def test_a_text_among_the_advanced_inputs_can_be_read(page):
    """On the canvas a widget's height is our word: an element needs more than a line."""
    page.open_example("train_a_subject")
    page.evaluate(
        """() => { const train = window.app.graph.nodes.find(
            (node) => node.comfyClass === 'CNTLoRATrain');
            train.showAdvanced = true; train.setSize(train.computeSize());
            window.app.canvas.draw(true, true); }"""
    )
    page.page.wait_for_timeout(1500)
    heights = page.evaluate(
        """() => window.app.graph.nodes.find((node) => node.comfyClass === 'CNTLoRATrain')
            .widgets.filter((w) => w.name === 'sample_prompt' && w.element?.offsetParent)
            .map((w) => w.element.clientHeight)"""
    )
    page.shot("advanced")
    assert page.renderer == "vue" or (heights and min(heights) >= 40)
