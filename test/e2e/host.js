"use strict";
// The least Matrix client that can hold Element Call as a widget: it sends
// what the widget sends, tells it what /sync tells, and vouches for its user.

const ID = "call";
const ANSWERS = {  // to actions that are the client's own to answer
    "io.element.join": {}, "io.element.device_mute": {},
    "io.element.close": {}, "im.vector.hangup": {},
    "set_always_on_screen": {success: true},
};
const seen = [];  // those the widget took, for the test

class Host extends mxwidgets.WidgetDriver {
    constructor(config) {
        super();
        Object.assign(this, config);  // server user device token room
        this.sticky = new Map();
        // Element Call takes any event for the end of the first sync: none
        // may come before the state.
        this.state = new Promise((resolve) => { this.stateTold = resolve; });
    }

    async ask(method, path, body) {
        const url = `${this.server}/_matrix/client/${path}`;
        const reply = await fetch(url, {
            method, body: body && JSON.stringify(body),
            headers: {Authorization: "Bearer " + this.token,
                      "Content-Type": "application/json"},
        });
        const json = await reply.json();
        if (reply.ok) return json;
        throw Object.assign(new Error(`${reply.status} ${json.error}`), {
            matrix: {http_status: reply.status, http_headers: {}, url,
                     response: json}});
    }

    // -- what the widget asks for

    validateCapabilities(wanted) { return Promise.resolve(wanted); }
    getKnownRooms() { return [this.room]; }
    processError(e) { return e.matrix && {matrix_api_error: e.matrix}; }

    async readRoomState(room, type, key) {
        const path = `v3/rooms/${encodeURIComponent(room)}/state`;
        return (await this.ask("GET", path)).filter((e) =>
            e.type === type && (key === undefined || e.state_key === key));
    }

    async readStickyEvents() {
        await this.state;
        return [...this.sticky.values()];
    }

    async send(room, type, content, key, delay, stick) {
        const query = new URLSearchParams();
        if (delay !== undefined) query.set("org.matrix.msc4140.delay", delay);
        if (stick !== undefined)
            query.set("org.matrix.msc4354.sticky_duration_ms", stick);
        const to = key === null ? ["send", type, crypto.randomUUID()]
            : ["state", type, key];
        const path = [room || this.room, ...to].map(encodeURIComponent);
        const got = await this.ask(
            "PUT", `v3/rooms/${path.join("/")}?${query}`, content);
        const sent = {roomId: room || this.room};
        if (delay === undefined) sent.eventId = got.event_id;
        else sent.delayId = got.delay_id;
        return sent;
    }

    sendEvent(type, content, key = null, room = null) {
        return this.send(room, type, content, key);
    }
    sendStickyEvent(stick, type, content, room = null) {
        return this.send(room, type, content, null, undefined, stick);
    }
    sendDelayedEvent(delay, type, content, key = null, room = null) {
        return this.send(room, type, content, key, delay);
    }
    sendDelayedStickyEvent(delay, stick, type, content, room = null) {
        return this.send(room, type, content, null, delay, stick);
    }

    async delayed(id, action) {
        await this.ask("POST", "unstable/org.matrix.msc4140/delayed_events/" +
            `${encodeURIComponent(id)}/${action}`, {});
    }
    cancelScheduledDelayedEvent(id) { return this.delayed(id, "cancel"); }
    restartScheduledDelayedEvent(id) { return this.delayed(id, "restart"); }
    sendScheduledDelayedEvent(id) { return this.delayed(id, "send"); }

    async askOpenID(observer) {
        const user = encodeURIComponent(this.user);
        const token = await this.ask(
            "POST", `v3/user/${user}/openid/request_token`, {});
        observer.update({state: mxwidgets.OpenIDRequestState.Allowed, token});
    }

    getRtcTransports() {
        return this.ask("GET", "unstable/org.matrix.msc4143/rtc/transports");
    }

    // -- what it is told

    open() {
        const url = new URL("call/index.html", location.href);
        url.hash = "?" + new URLSearchParams({
            widgetId: ID, parentUrl: location.origin, roomId: this.room,
            userId: this.user, deviceId: this.device, baseUrl: this.server,
            intent: "join_existing", perParticipantE2EE: false,
            confineToRoom: true, header: "none", lang: "en"});
        const iframe = document.querySelector("iframe");
        const widget = new mxwidgets.Widget({
            id: ID, creatorUserId: this.user, type: "m.call", url: url.href,
            waitForIframeLoad: false});
        this.api = new mxwidgets.ClientWidgetApi(widget, iframe, this);
        for (const [action, answer] of Object.entries(ANSWERS))
            this.api.on("action:" + action, (e) => {
                e.preventDefault();
                seen.push(action);
                this.api.transport.reply(e.detail, answer);
            });
        const send = this.api.transport.send.bind(this.api.transport);
        this.api.transport.send = (action, data) => {
            const answer = send(action, data);
            if (action === "update_state") this.stateTold(answer);
            return answer;
        };
        this.api.setViewedRoomId(this.room);
        iframe.src = url.href;
    }

    async follow() {
        let since;
        for (;;) {
            const query = new URLSearchParams({
                "org.matrix.msc4222.use_state_after": true,
                ...(since && {since, timeout: 30000})});
            const sync = await this.ask("GET", `v3/sync?${query}`);
            since = sync.next_batch;
            const joined = sync.rooms?.join?.[this.room] ?? {};
            const events = (part) => (joined[part]?.events ?? []).map(
                (e) => ({...e, room_id: this.room}));
            const timeline = [
                ...events("msc4354_sticky"), ...events("timeline")];
            for (const e of timeline)
                if (e.msc4354_sticky)
                    this.sticky.set(JSON.stringify([
                        e.sender, e.type, e.content.msc4354_sticky_key]), e);
            if (!this.api) this.open();
            for (const e of timeline)
                this.state.then(() => this.api.feedEvent(e))
                    .catch(console.error);
            for (const e of events("org.matrix.msc4222.state_after"))
                this.api.feedStateUpdate(e).catch(console.error);
        }
    }
}

// eslint-disable-next-line no-unused-vars
function start(config) {
    new Host(config).follow().catch(console.error);
}
