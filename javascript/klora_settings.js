// The size of the analysis cache on the Settings page is the present one whenever the tab is opened.

(function() {
    if (window.kloraSettings) return; // a second copy of the extension
    window.kloraSettings = true;

    onUiTabChange(() => {
        const settings = gradioApp().getElementById('tab_settings');
        const button = gradioApp().getElementById('klora_cache_size');
        if (settings && button && uiElementIsVisible(settings)) button.click();
    });
})();
