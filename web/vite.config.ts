import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vite'

// `npm run dev` shows the page with changes at once; what it asks for comes from a gateway on its default port.
const gateway = 'http://127.0.0.1:8000'

export default defineConfig({
  plugins: [svelte()],
  build: {
    outDir: '../src/corolla/gateway/static',
    emptyOutDir: true,
    target: 'es2022',
    assetsInlineLimit: 0, // the content security policy allows no data: scripts, and files are cached by name
  },
  server: { proxy: { '/api': gateway, '/v1': gateway } },
})
