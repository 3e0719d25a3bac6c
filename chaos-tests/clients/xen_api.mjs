// The stock xen-api from npm, the library of Xen Orchestra, at work in a pool that loses its masters.
//
// Run by a test: `xen_api.mjs LAB HOST`, LAB being the lab's state as JSON and HOST the name of a host that is not the
// master. Prints one JSON object for each thing it has done, and reads a line where it is to wait for the test.

import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'

const { resolve } = createRequire(join(process.env.XENITH_CLIENTS, 'node', 'package.json'))
const { createClient } = await import(pathToFileURL(resolve('xen-api')))

const EVENT_LIMIT = 20_000
const RETURN_LIMIT = 45_000
const WRITES = 10
// The library waits a minute before it asks again at a host that did not answer; its own option makes it a second.
const POLL_AGAIN = 1_000

const warnings = []
console.warn = (...parts) => warnings.push(parts.map(String).join(' '))

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const did = (what, more = {}) => console.log(JSON.stringify({ did: what, ...more }))
const toldToGoOn = async () => check(!(await lines.next()).done, 'the test is gone')

function check(truth, text) {
  if (!truth) {
    console.error(`xen_api: ${text}`)
    process.exit(1)
  }
}

async function within(limit, what, promise) {
  const late = Symbol('late')
  const result = await Promise.race([promise, delay(limit, late, { ref: false })])
  check(result !== late, `${what} took more than ${limit} ms; warnings: ${warnings.join('; ')}`)
  return result
}

const lab = JSON.parse(process.argv[2])
const first = lab.hosts.find(host => host.name === process.argv[3])
const xapi = createClient({
  allowUnauthorized: true,
  auth: { user: lab.user, password: lab.password },
  debounce: 20,
  eventPollDelay: POLL_AGAIN,
  url: first.url,
})
let sessions = 0
xapi.on('sessionId', () => sessions++)

// What the event loop put into the cache, in order.
const seen = []
const waiting = new Set()
let vm
const note = objects => {
  for (const object of Object.values(objects)) {
    if (object?.$ref === vm && seen.at(-1) !== object.name_description) {
      seen.push(object.name_description)
      waiting.forEach(look => look())
    }
  }
}
xapi.objects.on('add', note)
xapi.objects.on('update', note)

const heard = text =>
  within(
    EVENT_LIMIT,
    `the event of ${JSON.stringify(text)}`,
    new Promise(done => {
      const look = () => seen.at(-1) === text && waiting.delete(look) | done()
      waiting.add(look)
      look()
    })
  )

// Writes one after the other, each heard before the next: so each event must come by itself.
async function writeAndHear(title) {
  const start = seen.length
  const expected = Array.from({ length: WRITES }, (_, number) => `${title} ${number}`)
  for (const text of expected) {
    await within(EVENT_LIMIT, 'a write', xapi.setField('VM', vm, 'name_description', text))
    await heard(text)
  }
  check(
    JSON.stringify(seen.slice(start)) === JSON.stringify(expected),
    `events came otherwise than written: ${seen.slice(start)}`
  )
}

async function listEveryClass() {
  const counts = {}
  for (const type of xapi._types) {
    try {
      counts[type] = (await within(EVENT_LIMIT, `${type}.get_all_records`, xapi.getAllRecords(type))).length
    } catch (error) {
      check(error.code === 'MESSAGE_REMOVED', `${type}.get_all_records: ${error}`)
      counts[type] = null
    }
  }
  return counts
}

const calm = () => check(warnings.length === 0, `the client was not left in peace: ${warnings.join('; ')}`)

await within(EVENT_LIMIT, 'to connect', xapi.connect())
await within(EVENT_LIMIT, 'the first fetch', xapi.objectsFetched)
calm()
did('connect', { url: xapi._url.hostname, pool: xapi.pool.$ref })

const counts = await listEveryClass()
for (const [type, count] of Object.entries(counts)) {
  const cached = Object.values(xapi.objects.all).filter(object => object.$type === type).length
  // Sessions and tasks come and go; of all else the cache must hold what a call tells.
  check(cached === (count ?? 0) || type === 'session' || type === 'task', `the cache has ${cached} of ${count} ${type} objects`)
}
did('list', { counts })

const templates = Object.values(xapi.objects.all).filter(object => object.$type === 'VM' && object.is_a_template)
templates.sort((a, b) => a.VBDs.length - b.VBDs.length || a.name_label.localeCompare(b.name_label))
check(templates.length > 0, 'the pool has no templates')
// As a task: its result comes back through the events.
vm = await within(EVENT_LIMIT, 'Async.VM.clone', xapi.callAsync('VM.clone', templates[0].$ref, 'made by xen-api'))
await xapi.setFieldEntry('VM', vm, 'other_config', 'kept', 'through every change of master')
await writeAndHear('first master')
await within(EVENT_LIMIT, 'a barrier', xapi.barrier(vm))
did('write', { vm, url: xapi._url.hostname })

// The master changes, and the host this client talks to lives on: the client must not even notice.
await toldToGoOn()
await writeAndHear('second master')
calm()
check(sessions === 1, 'the client had to log in again')
did('go on at the old master')

// The new master is killed. The client still talks to the first one.
await toldToGoOn()
await writeAndHear('third master')
calm()
check(sessions === 1, 'the client had to log in again')
did('go on after a kill')

// Now the client's own host was killed and started again: connections were refused for a while. Its session and its
// token are as good as before.
await toldToGoOn()
const limit = Date.now() + RETURN_LIMIT
for (;;) {
  try {
    await xapi.setField('VM', vm, 'name_description', 'back')
    break
  } catch (error) {
    check(Date.now() < limit, `the host does not take calls again: ${error}`)
    await delay(100)
  }
}
await within(RETURN_LIMIT, 'events to come back', heard('back'))
await writeAndHear('fourth master')
check(sessions === 1, 'the client had to log in again')
const record = await xapi.getRecord('VM', vm)
check(record.other_config.kept === 'through every change of master', 'an acknowledged write is lost')
await within(EVENT_LIMIT, 'VM.destroy', xapi.callAsync('VM.destroy', vm))
did('return', { warnings: warnings.length })

await xapi.disconnect()
did('end')
process.exit(0)
