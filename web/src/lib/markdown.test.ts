import assert from 'node:assert/strict'
import { test } from 'node:test'
import { GrowingMarkdown, render } from './markdown.ts'

const ANSWER = `# Petals

Some *text* with \`code\`, a [link](https://example.org "t") and
a second line.

- one

- two
  - three

1. first
2. second

| a | b |
|---|---|
| 1 | 2 |

\`\`\`python
def ring():

    return "corolla" < 3
\`\`\`

> quoted
> twice

The end.
`

test('an answer that grows letter by letter ends as the whole answer does', () => {
  const growing = new GrowingMarkdown()
  let blocks: string[] = []
  for (let end = 1; end <= ANSWER.length; end++) blocks = growing.update(ANSWER.slice(0, end))
  assert.equal(blocks.join(''), render(ANSWER))
})

test('only the last block is parsed again', () => {
  const growing = new GrowingMarkdown()
  let text = ''
  for (let paragraph = 0; paragraph < 200; paragraph++) {
    text += `Paragraph ${paragraph} says something.\n\n`
    growing.update(text)
  }
  assert.ok(growing.parsed < 4 * text.length, `${growing.parsed} characters parsed for a text of ${text.length}`)
})

test('another text in its place is parsed from its beginning', () => {
  const growing = new GrowingMarkdown()
  growing.update('One.\n\nTwo.\n\nThree.')
  assert.equal(growing.update('Four.').join(''), '<p>Four.</p>\n')
})

test('HTML, images and links that run something are text', () => {
  const html = render('<script>x</script> <img src=x onerror=y>\n\n![i](https://other.host/p.png) [j](javascript:alert(1)) [k](data:text/html,x)')
  for (const mark of ['<script', '<img', 'javascript:', 'data:text']) assert.ok(!html.includes(mark), html)
})

test('code is coloured and carries its language', () => {
  const html = render('```python\nreturn "<b>"\n```')
  assert.match(html, /hljs-keyword/)
  assert.match(html, /&lt;b&gt;/)
  assert.match(html, /<span>python<\/span>/)
})
