import { mount } from 'svelte'
import App from './App.svelte'
import './app.css'
import './prose.css'
import { render } from './lib/markdown.ts'
import { sanitize } from './lib/sanitize.ts'

// So that the first words of an answer find ready what draws them.
const idle = window.requestIdleCallback ?? setTimeout
idle(() => sanitize(render('**a** `b`\n\n```python\nc = 1\n```')))

mount(App, { target: document.getElementById('app')! })
